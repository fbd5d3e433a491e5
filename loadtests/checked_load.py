"""A closed loop of clients. Every token of their streams is compared with an undisturbed run."""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtests import checks
from loadtests.answer import StreamedAnswer, StreamError
from loadtests.outcome import Outcome, outcome
from loadtests.served_model import ServedModel
from loadtests.stream_client import AsyncStreamClient
from loadtests.workload import PlannedRequest

#: Gaps from this length on are listed in the report.
PAUSE_S = 0.5

#: Pause of a client after a failure: a service that is gone is not asked a thousand times a second.
FAILURE_PAUSE_S = 1.0

#: Concurrent requests of the undisturbed run.
REFERENCE_CONCURRENCY = 4

#: Ranges of lengths, short and long, from which requests are drawn alternately.
PROMPT_TOKENS = ((8, 120), (120, 900))
OUTPUT_TOKENS = ((64, 150), (150, 500))


@dataclass(frozen=True, slots=True)
class Pause:
    """A gap between two chunks of a stream, in seconds since the load began."""

    begin_s: float
    length_s: float


@dataclass(slots=True)
class StreamRecord:
    """One stream of the load.

    Attributes:
        refusals: Times that the service asked to come back later.
        pauses: Gaps of at least `PAUSE_S`.
        broken: The connection broke, and all tokens until then were right.
        excused: Its API server was killed; see `loadtests.chaos.verdict`.
    """

    outcome: Outcome
    refusals: int
    pauses: list[Pause]
    broken: bool = False
    excused: bool = False

    @property
    def end_s(self) -> float:
        """When the stream ended, in seconds since the load began."""
        return self.outcome.at_s + self.outcome.e2e_s


@dataclass(frozen=True, slots=True)
class Reference:
    """A request and the answer that it has without faults."""

    request: PlannedRequest
    body: dict[str, Any]
    token_ids: list[int]
    text: str


def planned(seed: int, count: int, most_tokens: int) -> list[PlannedRequest]:
    """The requests of a run: short and long, of both APIs, a fifth with high priority.

    Args:
        most_tokens: Limit of prompt and answer together.
    """
    dice = random.Random(f"requests {seed}")
    requests = []
    for number in range(count):
        prompt = dice.randint(*PROMPT_TOKENS[number % 2])
        tokens = dice.randint(*OUTPUT_TOKENS[number // 2 % 2])
        prompt, tokens = min(prompt, most_tokens // 2), min(tokens, most_tokens // 2)
        api, priority = ("completions", "chat")[number % 3 == 0], -1 if number % 5 == 0 else 0
        requests.append(PlannedRequest(number, 0.0, api, prompt, tokens, priority))
    return requests


@dataclass(slots=True)
class CheckedLoad:
    """Clients that each send the next request when the previous one has ended.

    Attributes:
        num_clients: Number of concurrent streams.
        records: All ended streams.
        active: X-Request-Id of the running streams, and when each had its last token.
    """

    client: AsyncStreamClient
    seed: int
    num_clients: int
    num_references: int
    records: list[StreamRecord] = field(default_factory=list)
    active: dict[str, StreamedAnswer] = field(default_factory=dict)
    zero: float = 0.0
    _references: list[Reference] = field(default_factory=list)
    _next: int = 0
    _stopping: bool = False
    _clients: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self.zero

    async def take_references(self) -> None:
        """The undisturbed run.

        Raises:
            StreamError: A request failed, or a simulated engine's tokens are not those of its prompt.
        """
        model = await asyncio.to_thread(ServedModel.ask, _BlockingClient(self.client), None, self.seed)
        requests = planned(self.seed, self.num_references, model.max_tokens)
        limit = asyncio.Semaphore(REFERENCE_CONCURRENCY)

        async def take(request: PlannedRequest) -> Reference:
            body, answer = model.body(request), StreamedAnswer()
            async with limit:
                await self.client.stream_patiently(request.api, body, answer)
            checks.check_whole(answer)
            checks.check_counts(answer, request)
            if (vocabulary := checks.simulated_vocabulary(answer)) is not None:
                checks.check_simulated(answer, vocabulary, request.output_tokens)
            return Reference(request, body, answer.token_ids, answer.text)

        self._references = list(await asyncio.gather(*map(take, requests)))

    def start(self, apart_s: float = 0.1) -> None:
        """Starts the clients, one after another."""
        self.zero = time.perf_counter()
        self._clients = [asyncio.create_task(self._client(n, n * apart_s)) for n in range(self.num_clients)]

    async def stop(self, bound_s: float) -> int:
        """Starts no further stream, and waits for the last. Returns how many did not end within `bound_s`."""
        self._stopping = True
        _, left = await asyncio.wait(self._clients, timeout=bound_s)
        for task in left:
            task.cancel()
        await asyncio.gather(*self._clients)
        return len(left)

    async def close(self) -> None:
        """Ends the clients at once."""
        self._stopping = True
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def failed(self) -> Sequence[StreamRecord]:
        return [record for record in self.records if record.outcome.error is not None]

    async def _client(self, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        dice = random.Random(f"client {self.seed} {number}")
        while not self._stopping:
            await self._stream(dice.choice(self._references))

    async def _stream(self, reference: Reference) -> None:
        number, self._next = self._next, self._next + 1
        name, answer = f"checked-{self.seed}-{number}", StreamedAnswer()
        began, refusals, error = time.perf_counter(), 0, None
        request = replace(reference.request, number=number, at_s=began - self.zero)
        self.active[name] = answer
        try:
            refusals = await self.client.stream_patiently(
                request.api, reference.body, answer, {"X-Request-Id": name}
            )
            checks.check_whole(answer)
            checks.check_same(answer.token_ids, reference.token_ids)
            checks.check_text(answer.text, reference.text)
            checks.check_counts(answer, reference.request)
        except StreamError as failure:
            error = failure
        except asyncio.CancelledError:
            error = StreamError("the stream did not end", f"{len(answer.token_ids)} tokens")
        del self.active[name]
        broken = error is not None and (
            error.kind.startswith("connection failed") or error.kind == "the stream was cut off"
        )
        if broken and answer.token_ids != reference.token_ids[: len(answer.token_ids)]:
            broken, error = False, StreamError("tokens are wrong before the connection broke", str(error))
        result = outcome(request, answer, began, began, time.perf_counter(), error)
        self.records.append(StreamRecord(result, refusals, _pauses(answer.times_s, self.zero), broken))
        if error is not None:
            await asyncio.sleep(FAILURE_PAUSE_S)


def _pauses(times_s: Sequence[float], zero: float) -> list[Pause]:
    return [
        Pause(round(earlier - zero, 3), round(later - earlier, 3))
        for earlier, later in itertools.pairwise(times_s)
        if later - earlier >= PAUSE_S
    ]


class _BlockingClient:
    """Implements `loadtests.served_model.JsonClient` for another thread."""

    def __init__(self, client: AsyncStreamClient) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return asyncio.run_coroutine_threadsafe(self._client.json(path, body), self._loop).result()
