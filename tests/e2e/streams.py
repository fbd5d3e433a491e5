"""Streams that go on while a test does something to the cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.e2e.completion_client import Answer, Body, CompletionClient, Meanwhile, Move, Progress
from tests.e2e.simulated import simulated_answer
from tests.e2e.test_same_output import assert_same


class Stream:
    """One streamed request, begun by the constructor."""

    def __init__(
        self,
        client: CompletionClient,
        body: Body,
        headers: dict[str, str] | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> None:
        self.progress = Progress("")
        self._begun = asyncio.Event()
        self._meanwhile = meanwhile
        self.answer: asyncio.Task[Answer] = asyncio.create_task(client.stream(body, self._watch, headers))

    async def _watch(self, progress: Progress) -> list[Move]:
        self.progress = progress
        self._begun.set()
        return await self._meanwhile(progress) if self._meanwhile else []

    async def reached(self, tokens: int) -> None:
        await self._begun.wait()
        assert await self.progress.reached(tokens), "the request ended too early"

    @property
    def accepted_at(self) -> float:
        """When the server began to answer: it waits in a queue from about then on."""
        return self.progress.accepted_at

    @property
    def first_token_at(self) -> float:
        return self.progress.times[0]

    @property
    def last_token_at(self) -> float:
        return self.progress.times[-1]


@asynccontextmanager
async def streaming(
    client: CompletionClient, bodies: list[Body], tokens: int, meanwhile: Meanwhile | None = None
) -> AsyncIterator[list[Stream]]:
    """Streams of which each has had so many tokens; they go on, and end with the block at the latest."""
    streams = [Stream(client, body, meanwhile=meanwhile) for body in bodies]
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(stream.reached(tokens) for stream in streams))
        yield streams
    finally:
        for stream in streams:
            stream.answer.cancel()
        await asyncio.gather(*(stream.answer for stream in streams), return_exceptions=True)


async def answers(streams: list[Stream]) -> list[Answer]:
    return list(await asyncio.gather(*(stream.answer for stream in streams)))


@asynccontextmanager
async def load(client: CompletionClient, bodies: list[Body]) -> AsyncIterator[list[Answer]]:
    """A client for each asks it again and again, and looks at every answer, until the block ends.

    The engines are simulated, so what they answer is known. The list has the answers so far.
    """
    done = asyncio.Event()
    had: list[Answer] = []

    async def ask(body: Body) -> None:
        expected = simulated_answer(body)
        while not done.is_set():
            had.append(await client.stream(body))
            assert_same(had[-1], expected)

    async with asyncio.TaskGroup() as group:
        for body in bodies:
            group.create_task(ask(body))
        try:
            yield had
        finally:
            done.set()
