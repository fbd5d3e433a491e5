"""Requests that the checked streams do not cover: aborted ones, n = 2, and a JSON schema."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.servers import MODEL
from loadtests.stream_client import AsyncStreamClient, RefusedError

#: A schema whose answers are short whatever the model prefers.
PROPERTIES = {"kind": {"enum": ["a", "b"]}, "flag": {"type": "boolean"}}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": list(PROPERTIES),
    "additionalProperties": False,
}

Variant = Callable[[random.Random], Awaitable[None]]


class _EnoughReadError(Exception):
    """The client has read what it wanted, and goes away."""


class _ImpatientAnswer(StreamedAnswer):
    """Ends its stream after some chunks with tokens."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self._chunks = chunks

    def add(self, chunk: dict[str, Any], now_s: float) -> None:
        super().add(chunk, now_s)
        if len(self.times_s) >= self._chunks:
            raise _EnoughReadError


@dataclass(slots=True)
class VariantLoad:
    """One client for each variant, in a closed loop.

    Attributes:
        with_schema: Send requests with a JSON schema: a simulated engine does not follow one.
        sent: Number of requests that ended, by variant.
        failures: Number of failures, by variant and kind.
    """

    client: AsyncStreamClient
    seed: int
    with_schema: bool
    sent: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Starts the clients."""
        variants: dict[str, Variant] = {"abort": self._abort, "two choices": self._two_choices}
        if self.with_schema:
            variants["JSON schema"] = self._schema
        self._tasks = [asyncio.create_task(self._repeat(name, one)) for name, one in variants.items()]

    async def stop(self) -> None:
        """Aborts what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, name: str, variant: Variant) -> None:
        dice = random.Random(f"{name} {self.seed}")
        while True:
            try:
                await variant(dice)
                self.sent[name] += 1
            except RefusedError as refused:
                await asyncio.sleep(refused.retry_after_s)
            except StreamError as error:
                self.failures[f"{name}: {error.kind}: {error.detail:.80}"] += 1
                await asyncio.sleep(1.0)
            await asyncio.sleep(dice.expovariate(2.0))

    async def _abort(self, dice: random.Random) -> None:
        """Leaves before the first token, or in the middle."""
        body, leave_s = self._body(dice, max_tokens=800, stream=True), None
        if dice.random() < 0.3:
            leave_s = dice.uniform(0.0, 0.3)
        with suppress(_EnoughReadError, TimeoutError):
            async with asyncio.timeout(leave_s):
                await self.client.stream("completions", body, _ImpatientAnswer(dice.randint(1, 60)))

    async def _two_choices(self, dice: random.Random) -> None:
        tokens = dice.randint(16, 120)
        answer = await self.client.json(
            "/v1/completions", self._body(dice, n=2, temperature=0.8, seed=7, max_tokens=tokens)
        )
        counted = answer["usage"]["completion_tokens"]
        if len(answer["choices"]) != 2 or counted != 2 * tokens:
            raise StreamError("wrong choices", f"{len(answer['choices'])}, {counted} tokens")

    async def _schema(self, dice: random.Random) -> None:
        constraint = {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False, "max_tokens": 400}
        answer = await self.client.json("/v1/completions", self._body(dice, **constraint))
        choice = answer["choices"][0]
        if choice["finish_reason"] == "length":
            return  # white space may go on for ever
        try:
            found = json.loads(choice["text"])
        except ValueError as error:
            raise StreamError("an answer is not what its schema asks for", choice["text"]) from error
        if set(found) != set(PROPERTIES):
            raise StreamError("an answer is not what its schema asks for", choice["text"])

    @staticmethod
    def _body(dice: random.Random, **given: Any) -> dict[str, Any]:
        prompt = dice.choices(range(97, 123), k=dice.randint(4, 200))
        common = {"model": MODEL, "prompt": prompt, "ignore_eos": True, "return_token_ids": True}
        return common | given
