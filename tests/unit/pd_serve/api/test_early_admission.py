"""The first request of a response is admitted when vLLM makes its generator."""

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State

from pd_serve.api.early_admission import admit_early
from pd_serve.api.overload import Arrival, _arrival, was_admitted
from pd_serve.errors import OverloadedError


class Client:
    """Takes requests until it is full."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, int]] = []
        self.is_full = False

    def admit(self, prompt: Any, sampling_params: Any, request_id: str, priority: int) -> None:
        if self.is_full:
            raise OverloadedError("full")
        self.admitted.append((request_id, priority))


def serving(made: list[dict[str, Any]]) -> State:
    """vLLM's serving object, which notes what its generators are made of."""
    state = State()
    state.openai_serving_responses = SimpleNamespace(
        _generate_with_builtin_tools=lambda **named: made.append(named)
    )
    return state


def generate(state: State, **more: Any) -> None:
    made = state.openai_serving_responses._generate_with_builtin_tools
    made(request_id="resp", engine_input="prompt", sampling_params="params", context="context", **more)


def test_the_first_request_of_a_response_is_admitted_once() -> None:
    made: list[dict[str, Any]] = []
    state, client = serving(made), Client()
    admit_early(state, client)  # type: ignore[arg-type]
    token = _arrival.set(Arrival(set(), lambda number: None))
    try:
        generate(state, priority=-1)

        assert client.admitted == [("resp_0", -1)]
        assert was_admitted("resp_0")
        assert not was_admitted("resp_1"), "what follows a call of a tool"
        assert made == [
            {
                "request_id": "resp",
                "engine_input": "prompt",
                "sampling_params": "params",
                "context": "context",
                "priority": -1,
            }
        ]
    finally:
        _arrival.reset(token)
    assert not was_admitted("resp_0"), "another HTTP request"


def test_a_refused_response_has_no_generator() -> None:
    made: list[dict[str, Any]] = []
    state, client = serving(made), Client()
    client.is_full = True
    admit_early(state, client)  # type: ignore[arg-type]

    with pytest.raises(OverloadedError):
        generate(state)

    assert made == []


def test_a_model_without_responses_is_left_alone() -> None:
    state = State()
    state.openai_serving_responses = None

    admit_early(state, Client())  # type: ignore[arg-type]

    assert state.openai_serving_responses is None
