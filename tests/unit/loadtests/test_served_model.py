"""The served model, as read from a service."""

from typing import Any

import pytest

from loadtests.answer import StreamError
from loadtests.prompts import SAMPLE_TEXT
from loadtests.served_model import ServedModel
from loadtests.workload import PlannedRequest


class BytesService:
    """A service with two models whose tokens are bytes; its chat template adds 3 tokens."""

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": name, "max_model_len": 100} for name in ("first", "second")]}
        assert body is not None
        if path == "/detokenize":
            return {"prompt": bytes(body["tokens"]).decode()}
        text = body["prompt"] if "prompt" in body else "<<<" + body["messages"][0]["content"]
        return {"tokens": list(text.encode()), "count": len(text)}


def test_the_first_model_is_the_default() -> None:
    assert ServedModel.ask(BytesService(), None, seed=0).name == "first"
    assert ServedModel.ask(BytesService(), "second", seed=0).name == "second"


def test_an_unknown_model_is_refused_with_the_served_ones() -> None:
    with pytest.raises(StreamError, match="no model 'third'") as failure:
        ServedModel.ask(BytesService(), "third", seed=0)
    assert failure.value.detail == "there are first, second"


def test_bodies_have_prompts_of_the_planned_length() -> None:
    model = ServedModel.ask(BytesService(), None, seed=0)

    completion = model.body(PlannedRequest(0, 0.0, "completions", 20, 5, priority=-1))
    chat = model.body(PlannedRequest(1, 0.0, "chat", 20, 5))

    assert len(completion["prompt"]) == 20
    assert set(completion["prompt"]) <= set(SAMPLE_TEXT.encode())
    assert (completion["priority"], completion["max_tokens"], completion["ignore_eos"]) == (-1, 5, True)
    assert len(chat["messages"][0]["content"]) == 20 - 3
