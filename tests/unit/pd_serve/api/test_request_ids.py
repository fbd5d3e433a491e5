"""Ids by which a request that is sent again is found, and no other one."""

from typing import Any

import pytest
from starlette.datastructures import Headers
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from migration.messages import stem_of
from pd_serve.api import identity
from pd_serve.api.request_ids import MAX_ID_CHARS, StemInputProcessor
from pd_serve.errors import InvalidRequestError


def assigned(
    name: str = "cmpl-mine-0",
    prompt: Any = (1, 2, 3),
    key: str = "",
    client_id: str = "mine",
    adapter: LoRARequest | None = None,
    **parameters: Any,
) -> str:
    request = EngineCoreRequest(
        name, list(prompt), None, SamplingParams(**parameters), None, 0.0, adapter, None, None
    )
    token = identity._headers.set(Headers({"X-Request-Id": client_id, "Authorization": key}))
    try:
        StemInputProcessor.assign_request_id(request)
    finally:
        identity._headers.reset(token)
    assert request.external_req_id == name
    return request.request_id


def test_an_id_that_every_message_would_carry_has_a_limit() -> None:
    assert stem_of(assigned("cmpl-" + "a" * (MAX_ID_CHARS - 5)))
    with pytest.raises(InvalidRequestError, match="request_id has 1001 characters, and may have 1000"):
        assigned("cmpl-" + "a" * (MAX_ID_CHARS - 4))


def test_a_request_that_is_sent_again_has_another_id_of_the_same_stem() -> None:
    grammar = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "string"}}})
    for parameters in (
        {},
        {"stop": ["x"], "seed": 1, "stop_token_ids": [9, 5]},
        {"structured_outputs": grammar},
        {"logit_bias": {5: 1.0, 3: -1.0}},
        {"extra_args": {"a": {1: 2}}, "bad_words": ["x"]},
        {"adapter": LoRARequest("french", 7, "/french")},
    ):
        first, second = assigned(**parameters), assigned(**parameters)
        assert first != second
        assert stem_of(first) == stem_of(second) != ""


@pytest.mark.parametrize(
    "other",
    [
        {"name": "cmpl-mine-1"},
        {"prompt": (1, 2, 4)},
        {"key": "Bearer other"},
        {"temperature": 0.5},
        {"max_tokens": 7},
        {"stop": ["x"]},
        {"logit_bias": {5: 1.0}},
        {"adapter": LoRARequest("french", 7, "/french")},
    ],
)
def test_another_request_has_another_stem(other: dict[str, Any]) -> None:
    assert stem_of(assigned()) != stem_of(assigned(**other))


def test_a_request_with_another_adapter_has_another_stem() -> None:
    """Its name may have been given to another one meanwhile; its number does not count."""
    stems = {
        stem_of(assigned(adapter=LoRARequest(name, number, path)))
        for name, number, path in [("a", 1, "/a"), ("a", 2, "/a"), ("b", 1, "/a"), ("a", 1, "/b")]
    }
    assert len(stems) == 3


@pytest.mark.parametrize("parameters", [{"logprobs": 1}, {"prompt_logprobs": 0}, {"client_id": ""}])
def test_a_request_with_logprobs_or_without_an_id_of_its_client_is_never_found(
    parameters: dict[str, Any],
) -> None:
    first, second = assigned(**parameters), assigned(**parameters)

    assert first != second
    assert stem_of(first) == stem_of(second) == ""


@pytest.mark.parametrize("parameters", [{}, {"logprobs": 1}, {"client_id": ""}])
def test_a_name_cannot_pretend_to_be_a_stem(parameters: dict[str, Any]) -> None:
    """Neither the stem itself nor all of another request's id."""
    theirs = assigned(name="chatcmpl-mine")

    for name in (stem_of(theirs), theirs, f"{theirs}.", f"{stem_of(theirs)}-"):
        assert stem_of(assigned(name=name, **parameters)) != stem_of(theirs)


def test_parameters_that_cannot_be_compared_have_no_stem_and_are_served() -> None:
    assert stem_of(assigned(extra_args={"a": {(1, 2): 3}})) == ""
