"""Runs of steps as one event: an engine with them does and says the same at the same times."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from migration.engine_interface import EngineEvents
from migration.messages import RequestId
from migration.token_span import TokenSpan
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.outputs import SimulatedOutput, SimulatedPayload, decode_payload
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.virtual_time import VirtualLoop
from router.load import EngineLoad

MODEL = LinearCostModel((5.0, 1.0, 0.0), (10.0, 1.0, 0.1))
DELIVERY_S = 0.25

Scenario = Callable[["RecordedEngine"], Coroutine[Any, Any, None]]


class RecordedEngine:
    """An engine on whose link a copy can be under way, and what it has said, with the times.

    Attributes:
        tokens: (delivery, token) by request.
        messages: Number of messages with tokens.
    """

    def __init__(self, *, runs: bool, **changes: Any) -> None:
        base = {"num_blocks": 32, "block_tokens": 4, "watermark": 0.0}
        self.is_copying = False
        self.tokens: dict[str, list[tuple[float, int]]] = {}
        self.loads: list[tuple[float, EngineLoad]] = []
        self.messages = 0
        self.noted: list[Any] = []
        self._loop = asyncio.get_running_loop()
        events = EngineEvents(
            on_prefill_started=lambda started: None,
            on_requests_ended=lambda ended: None,
            on_load=lambda load: self.loads.append((self._loop.time(), load)),
            on_death=lambda error: None,
        )
        self.engine = SimulatedEngine(
            EngineSettings(MODEL, **(base | changes)),
            decode_payload,
            self._hear,
            events,
            lambda: self.is_copying,
            (lambda: DELIVERY_S) if runs else None,
        )

    def _hear(self, client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        self.messages += 1
        for output in outputs:
            now = self._loop.time() + DELIVERY_S
            known = output.delivered or []
            times = [*known, *[now] * (len(output.new_token_ids) - len(known))]
            new = zip(times, output.new_token_ids, strict=True)
            self.tokens.setdefault(output.request_id, []).extend(new)

    async def add(self, request_id: str, prompt_tokens: int, max_tokens: int) -> None:
        payload = SimulatedPayload(request_id, prompt_tokens, max_tokens, 0, self._loop.time(), (), 7)
        await self.engine.add(payload.encode(), "client")

    def copy(self, is_copying: bool) -> None:
        self.is_copying = is_copying
        self.engine.pace_changes()


def run(scenario: Scenario, *, runs: bool, **changes: Any) -> RecordedEngine:
    async def main() -> RecordedEngine:
        recorded = RecordedEngine(runs=runs, **changes)
        await scenario(recorded)
        await asyncio.sleep(10.0)
        recorded.noted += [recorded.engine.steps, recorded.engine.busy_s, recorded.engine.progress]
        recorded.noted.append(await recorded.engine.check_integrity())
        return recorded

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


async def one_request(recorded: RecordedEngine) -> None:
    await recorded.add("a", 10, 40)


async def requests_that_come_during_others(recorded: RecordedEngine) -> None:
    for number in range(6):
        await recorded.add(str(number), 5 + number, 30 - number)
        await asyncio.sleep(0.0473)


async def looks_at_any_time(recorded: RecordedEngine) -> None:
    await recorded.add("a", 10, 40)
    await recorded.add("b", 7, 30)
    for _ in range(60):
        await asyncio.sleep(0.0091)
        recorded.noted.append((recorded.engine.load(), recorded.engine.progress))


async def calls(recorded: RecordedEngine) -> None:
    await recorded.add("a", 10, 40)
    await recorded.add("b", 7, 30)
    for _ in range(9):
        await asyncio.sleep(0.0371)
        recorded.noted += [await recorded.engine.running_requests(), await recorded.engine.held_blocks()]
        recorded.noted.append(asyncio.get_running_loop().time())


async def copies(recorded: RecordedEngine) -> None:
    await recorded.add("a", 10, 40)
    for _ in range(5):
        await asyncio.sleep(0.0333)
        recorded.copy(True)
        await asyncio.sleep(0.0222)
        recorded.copy(False)


async def an_abort(recorded: RecordedEngine) -> None:
    await recorded.add("a", 10, 40)
    await recorded.add("b", 7, 30)
    await asyncio.sleep(0.1234)
    recorded.noted.append(await recorded.engine.abort(["a", "nobody"]))  # type: ignore[list-item]


SCENARIOS: list[Scenario] = [
    one_request,
    requests_that_come_during_others,
    looks_at_any_time,
    calls,
    copies,
    an_abort,
]
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "too few blocks": {"num_blocks": 14},
    "chunks": {"chunk_tokens": 6},
    "prefix cache": {"prefix_caching": True},
    "sampled": {"sampled": True},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_engine_says_the_same_at_the_same_times(scenario: Scenario, changes: dict[str, Any]) -> None:
    by_run, by_step = (run(scenario, runs=runs, **changes) for runs in (True, False))

    assert by_run.tokens == by_step.tokens
    assert by_run.loads == by_step.loads
    assert by_run.noted == by_step.noted


def test_tokens_wait_for_the_end_of_their_request() -> None:
    """The first one, and the second one, which the first decode step generates, do not."""
    by_run, by_step = (run(one_request, runs=runs) for runs in (True, False))

    assert by_step.messages == 40
    assert by_run.messages == 2


def test_tokens_that_wait_are_sent_before_what_concerns_their_request() -> None:
    async def looked_at(recorded: RecordedEngine) -> None:
        await recorded.add("a", 10, 40)
        await recorded.add("b", 7, 30)
        await asyncio.sleep(0.2345)
        description = await recorded.engine.describe(RequestId("a"))
        recorded.noted.append((description.output_token_ids, len(recorded.tokens["a"])))
        await recorded.engine.resume(RequestId("b"), 3)
        recorded.noted.append(len(recorded.tokens["b"]))

    by_run, by_step = (run(looked_at, runs=runs) for runs in (True, False))

    assert by_run.noted == by_step.noted
    assert by_run.tokens == by_step.tokens


def test_a_request_that_is_preempted_during_a_run_loses_no_token() -> None:
    async def preempted(recorded: RecordedEngine) -> None:
        await recorded.add("a", 10, 40)
        await recorded.add("b", 7, 30)
        await asyncio.sleep(0.1234)
        recorded.engine.preempt("b")

    by_run, undisturbed = run(preempted, runs=True), run(looks_at_any_time, runs=True)

    for name in ("a", "b"):
        assert [token for _, token in by_run.tokens[name]] == [t for _, t in undisturbed.tokens[name]]


def test_with_asynchronous_scheduling_each_step_is_an_event() -> None:
    """The next step is decided before the calls that a run would be cut for."""
    recorded = run(one_request, runs=True, async_scheduling=True)

    assert len(recorded.tokens["a"]) == 40
    assert recorded.engine.progress.turns > 40
