"""Completions over HTTP as plain values that can be compared, and migrations while they stream."""

import asyncio
import itertools
import json
import math
import os
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Body = dict[str, Any]


@dataclass
class Choice:
    """One choice of an answer, whether it was streamed or not."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None

    def add(self, part: dict[str, Any]) -> None:
        self.token_ids += part.get("token_ids") or []
        self.text += part["text"]
        self.finish_reason = part["finish_reason"] or self.finish_reason
        self.stop_reason = part.get("stop_reason") or self.stop_reason
        self.prompt_logprobs = part.get("prompt_logprobs") or self.prompt_logprobs
        if part.get("logprobs"):
            self.logprobs += part["logprobs"]["token_logprobs"]
            self.top_logprobs += part["logprobs"]["top_logprobs"] or []


@dataclass
class Move:
    """What `POST /cluster/migrate` said."""

    status: int
    body: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.status == 200


@dataclass
class Answer:
    choices: dict[int, Choice]
    usage: dict[str, Any]
    request_id: str
    moves: list[Move] = field(default_factory=list)

    @property
    def only(self) -> Choice:
        (choice,) = self.choices.values()
        return choice


class CompletionClient:
    """Talks to one server. `instances` are the places that `wander` and `ping_pong` move requests to."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.instances: list[str] = []

    async def answer(self, body: Body, meanwhile: "Meanwhile | None" = None) -> Answer:
        """Not streamed; with something else done to the request meanwhile."""
        progress = Progress(uuid.uuid4().hex)
        progress.advance(1)  # nothing can be seen of it, so nobody waits to see something
        async with _beside(meanwhile, progress) as moves:
            headers = {"X-Request-Id": progress.request_id}
            response = await self.http.post("/v1/completions", json=_request(body), headers=headers)
            assert response.status_code == 200, response.text
        answer = Answer({}, response.json()["usage"], progress.request_id, moves)
        for part in response.json()["choices"]:
            answer.choices.setdefault(part["index"], Choice()).add(part)
        return answer

    @asynccontextmanager
    async def open(
        self, body: Body, request_id: str = "", headers: dict[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """A streamed answer's chunks; leaving the block before their end disconnects."""
        request_id = request_id or uuid.uuid4().hex
        options = {"include_usage": True}
        request = _request(body) | {"stream": True, "stream_options": options}
        headers = {"X-Request-Id": request_id, **(headers or {})}
        async with self.http.stream("POST", "/v1/completions", json=request, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                raise httpx.HTTPStatusError(response.text, request=response.request, response=response)
            yield _events(response)

    async def stream(
        self, body: Body, meanwhile: "Meanwhile | None" = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Streamed; with something else done to the request meanwhile."""
        progress = Progress(uuid.uuid4().hex)
        answer = Answer({}, {}, progress.request_id)
        async with (
            _beside(meanwhile, progress) as answer.moves,
            self.open(body, progress.request_id, headers) as events,
        ):
            progress.accepted_at = time.monotonic()
            async for event in events:
                assert "error" not in event, event
                answer.usage = event.get("usage") or answer.usage
                for part in event["choices"]:
                    answer.choices.setdefault(part["index"], Choice()).add(part)
                    progress.advance(len(part.get("token_ids") or []))
        return answer

    async def migrate(self, request_id: str, destination: str) -> Move:
        body = {"request_id": request_id, "destination": destination}
        response = await self.http.post("/cluster/migrate", json=body)
        assert response.status_code in (200, 404, 409), response.text
        return Move(response.status_code, response.json())

    async def drain(self, instance: str, **options: bool) -> None:
        response = await self.http.post("/cluster/drain", json={"instance": instance, **options})
        assert response.status_code == 202, response.text

    async def until(self, found: Callable[[dict[str, Any]], bool], bound_s: float = 60.0) -> dict[str, Any]:
        """Waits until something is true of `GET /cluster`."""
        seen: dict[str, Any] = {}
        try:
            async with asyncio.timeout(bound_s):
                while not found(seen := await self.cluster()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {bound_s} s: {seen}") from None
        return seen

    async def cluster(self) -> dict[str, Any]:
        response = await self.http.get("/cluster")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def timelines(self, request_id: str) -> list[dict[str, Any]]:
        """One for each choice."""
        response = await self.http.get(f"/cluster/requests/{request_id}")
        assert response.status_code == 200, response.text
        return list(response.json()["requests"])

    async def handed_off(self, request_id: str, times: int = 1, bound_s: float = 60.0) -> list[str]:
        """Waits for `times` hand-offs of a request and that it is there, or for its end. Returns where to.

        The cluster's counters say nothing of one request: records of earlier ones may arrive meanwhile.
        """
        places: list[str] = []
        timeline: dict[str, Any] = {}
        try:
            async with asyncio.timeout(bound_s):
                while len(places) < times or timeline["instance"] not in (places[-1], None):
                    (timeline,) = await self.timelines(request_id)
                    places = [
                        move["destination"]
                        for move in timeline["migrations"]
                        if (move["reason"], move["outcome"]) == ("handoff", "committed")
                    ]
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not {times} hand-offs within {bound_s} s: {timeline}") from None
        return places

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples in `GET /metrics`, over all labels. At least one has to be there."""
        text = (await self.http.get("/metrics")).text
        families = text_string_to_metric_families(text)
        samples = [sample.value for family in families for sample in family.samples if sample.name == name]
        assert samples, f"no metric {name}"
        return sum(samples)

    async def integrity(self) -> dict[str, Any]:
        response = await self.http.get("/cluster/integrity")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def at(self, points: list[int], rng: random.Random) -> "Meanwhile":
        """Moves a request to a random place each time that its client has seen so many tokens."""

        async def move(progress: Progress) -> list[Move]:
            moves = []
            for point in points:
                if not await progress.reached(point):
                    break
                moves.append(await self.migrate(progress.request_id, rng.choice(self.instances)))
            return moves

        return move

    def tour(self, places: list[str], every: int = 30) -> "Meanwhile":
        """Moves a request to these places in order, whenever its client has seen `every` more tokens.

        A place where it is already needs no move.
        """

        async def move(progress: Progress) -> list[Move]:
            moves: list[Move] = []
            for stop, place in enumerate(places, 1):
                assert await progress.reached(every * stop), "the request ended too early"
                for _ in range(200):  # while it is on the move for other reasons
                    move = await self.migrate(progress.request_id, place)
                    if "migrated already" not in str(move.body):
                        break
                    await asyncio.sleep(0.005)
                if move.done or move.body["error"]["reason"] != "already_here":
                    moves.append(move)
            return moves

        return move

    def kill_after(self, tokens: int) -> "Meanwhile":
        """Kills the instance that a request was handed off to, once the request has this many tokens."""

        async def kill(progress: Progress) -> list[Move]:
            assert await progress.reached(tokens)
            (place,) = await self.handed_off(progress.request_id)
            instances = (await self.cluster())["instances"]
            os.kill(next(i["pid"] for i in instances if i["id"] == place), signal.SIGKILL)
            return []

        return kill

    def wander(self, rng: random.Random, pause_s: float = 0.0) -> "Meanwhile":
        """Moves a request to random places, one migration after the other, until it ends."""

        async def move(progress: Progress) -> list[Move]:
            moves: list[Move] = []
            await progress.reached(1)
            while not progress.ended:
                moves.append(await self.migrate(progress.request_id, rng.choice(self.instances)))
                await asyncio.sleep(rng.uniform(0.0, pause_s) if moves[-1].done else 0.005)
            return moves

        return move


class Progress:
    """How many tokens of a streamed request its client has seen, and when."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tokens = 0
        self.accepted_at = math.inf
        self.times: list[float] = []
        self.ended = False
        self._changed = asyncio.Event()

    def advance(self, tokens: int) -> None:
        self.tokens += tokens
        self.times.append(time.monotonic())
        self._changed.set()

    @property
    def longest_gap_s(self) -> float:
        return max(later - earlier for earlier, later in itertools.pairwise(self.times))

    def end(self) -> None:
        self.ended = True
        self._changed.set()

    async def reached(self, tokens: int) -> bool:
        """Waits until so many were seen. False if the request ended before."""
        while self.tokens < tokens and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        return self.tokens >= tokens and not self.ended


Meanwhile = Callable[[Progress], Awaitable[list[Move]]]


@asynccontextmanager
async def _beside(meanwhile: Meanwhile | None, progress: Progress) -> AsyncIterator[list[Move]]:
    """Runs `meanwhile` beside the block; the list is filled when both have ended."""
    moves: list[Move] = []
    task = asyncio.ensure_future(meanwhile(progress)) if meanwhile is not None else None
    try:
        yield moves
    finally:
        progress.end()
        if task is not None:
            moves += await task


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _request(body: Body) -> Body:
    return {"model": "tiny", "temperature": 0, "return_token_ids": True, **body}
