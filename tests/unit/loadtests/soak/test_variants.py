"""Requests beside the checked streams."""

import asyncio
import random
from typing import Any

import pytest

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.soak.variants import VariantLoad
from loadtests.stream_client import AsyncStreamClient, RefusedError


class ScriptedClient(AsyncStreamClient):
    """Answers every request in the same way.

    Attributes:
        read: Number of chunks that each aborted stream was read to.
    """

    def __init__(self, answer: dict[str, Any] | None = None, error: StreamError | None = None) -> None:
        super().__init__("http://localhost")
        self.bodies: list[dict[str, Any]] = []
        self.read: list[int] = []
        self._answer = answer or {}
        self._error = error

    async def json(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        self.bodies.append(body or {})
        if self._error is not None:
            raise self._error
        return self._answer

    async def stream(
        self, api: str, body: dict[str, Any], answer: StreamedAnswer, headers: object = None
    ) -> None:
        self.bodies.append(body)
        for number in range(body["max_tokens"]):
            await asyncio.sleep(0)
            self.read.append(number)
            answer.add({"choices": [{"text": "a", "token_ids": [97]}]}, float(number))


def load(client: ScriptedClient, with_schema: bool = True) -> VariantLoad:
    return VariantLoad(client, 1, with_schema)


async def test_an_aborted_stream_is_not_read_to_its_end() -> None:
    client = ScriptedClient()
    for seed in range(10):
        client.read.clear()
        await load(client)._abort(random.Random(seed))
        assert len(client.read) < client.bodies[-1]["max_tokens"]


async def test_two_choices_are_counted() -> None:
    dice = random.Random(1)
    tokens = random.Random(1).randint(16, 120)
    right = {"choices": [{}, {}], "usage": {"completion_tokens": 2 * tokens}}
    client = ScriptedClient(right)

    await load(client)._two_choices(dice)

    assert client.bodies[0]["n"] == 2
    with pytest.raises(StreamError, match="wrong choices"):
        await load(ScriptedClient(right | {"choices": [{}]}))._two_choices(random.Random(1))


@pytest.mark.parametrize(
    ("text", "finish_reason", "right"),
    [
        ('{"kind": "a", "flag": true}', "stop", True),
        ('{"kind": "a"', "length", True),
        ('{"kind": "a"', "stop", False),
        ('{"kind": "a"}', "stop", False),
    ],
)
async def test_answers_follow_their_schema(text: str, finish_reason: str, right: bool) -> None:
    client = ScriptedClient({"choices": [{"text": text, "finish_reason": finish_reason}]})
    if right:
        return await load(client)._schema(random.Random(1))
    with pytest.raises(StreamError, match="not what its schema asks for"):
        await load(client)._schema(random.Random(1))


@pytest.mark.parametrize("with_schema", [True, False])
async def test_failures_are_counted_by_kind_and_refusals_are_none(with_schema: bool) -> None:
    one = load(ScriptedClient(error=StreamError("HTTP 500", "x")), with_schema)
    one.start()
    while not one.failures:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await one.stop()

    assert "two choices: HTTP 500: x" in one.failures
    assert ("JSON schema: HTTP 500: x" in one.failures) is with_schema

    refused = load(ScriptedClient(error=RefusedError(429, 0.0, "")))
    refused.start()
    await asyncio.sleep(0.1)
    await refused.stop()
    assert not refused.failures
