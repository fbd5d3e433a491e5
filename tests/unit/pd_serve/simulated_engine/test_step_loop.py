"""Steps and the calls between them, with and without asynchronous scheduling."""

import asyncio
from collections.abc import Sequence

import pytest

from migration.errors import EngineDeadError
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.batcher import Step
from pd_serve.simulated_engine.decode_run import DecodeRun
from pd_serve.simulated_engine.step_loop import SimulatedStepLoop
from tests.virtual_time import in_virtual_time

STEP_S = 0.01


class Engine:
    """Does three steps of equal duration and records what happens.

    Args:
        runs: Numbers of steps of the runs that it plans; then each step is an event.
        reports: Steps of a run after which it reports.
    """

    def __init__(self, *runs: int, reports: Sequence[int] = ()) -> None:
        self.left = 3
        self.runs = list(runs)
        self.reports = reports
        self.hangs = False
        self.reported: list[float] = []
        self.events: list[str] = []

    def schedule(self) -> Step | None:
        if not self.left:
            return None
        self.left -= 1
        self.events.append("schedule")
        return Step([], [], STEP_S)

    def begin(self, step: Step) -> float:
        return 1e9 if self.hangs else step.duration_s

    def plan(self, step: Step, ends_at: float) -> DecodeRun | None:
        if not self.runs:
            return None
        steps = self.runs.pop(0)
        ends = [ends_at + n * STEP_S for n in range(steps)]
        return DecodeRun(step, [STEP_S] * steps, ends, [0] * steps, list(self.reports))

    def catch_up(self, run: DecodeRun, steps: int) -> None:
        self.events.append(f"catch up {steps}")

    def finish(self, step: Step) -> None:
        self.events.append("finish")

    def at_boundary(self) -> None:
        self.events.append("boundary")

    def report(self) -> None:
        self.reported.append(asyncio.get_running_loop().time())


@pytest.mark.parametrize("one_ahead", [False, True])
@in_virtual_time
async def test_a_call_waits_for_the_end_of_the_step(one_ahead: bool) -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=one_ahead)
    loop.submit(lambda: None)
    await asyncio.sleep(STEP_S / 2)
    began = asyncio.get_running_loop().time()

    assert await loop.call(lambda: 7) == 7
    assert asyncio.get_running_loop().time() - began == pytest.approx(STEP_S / 2, abs=1e-3)


@in_virtual_time
async def test_with_asynchronous_scheduling_a_step_is_decided_before_the_calls_of_its_boundary() -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=True)
    loop.submit(lambda: None)
    await asyncio.sleep(STEP_S / 2)

    in_flight = await loop.call(lambda: loop.in_flight)

    assert in_flight is not None
    assert engine.events == ["boundary", "schedule", "finish", "schedule", "boundary"]


@in_virtual_time
async def test_without_it_no_step_is_in_flight_during_a_call() -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=False)
    loop.submit(lambda: None)
    await asyncio.sleep(STEP_S / 2)

    assert await loop.call(lambda: loop.in_flight) is None


@in_virtual_time
async def test_an_error_of_a_call_reaches_its_caller_only() -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=False)

    def fail() -> None:
        raise InvalidRequestError("no")

    with pytest.raises(InvalidRequestError):
        await loop.call(fail)
    assert await loop.call(lambda: 1) == 1


@in_virtual_time
async def test_a_stopped_loop_takes_no_calls() -> None:
    loop = SimulatedStepLoop(Engine(), one_ahead=False)
    loop.stop()

    with pytest.raises(EngineDeadError):
        await loop.call(lambda: 1)


@pytest.mark.parametrize("one_ahead", [False, True])
@in_virtual_time
async def test_a_step_that_hangs_ends_all_progress(one_ahead: bool) -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=one_ahead)
    loop.submit(lambda: None)
    await asyncio.sleep(STEP_S * 0.5)
    before = loop.progress
    engine.hangs = True
    await asyncio.sleep(STEP_S)
    stands = loop.progress
    assert stands.turns == before.turns + 1
    call = asyncio.create_task(loop.call(lambda: 7))
    await asyncio.sleep(100)
    assert loop.progress == stands
    assert stands.is_busy
    assert not call.done()
    call.cancel()


@in_virtual_time
async def test_an_idle_engine_is_not_busy() -> None:
    engine = Engine()
    loop = SimulatedStepLoop(engine, one_ahead=False)
    loop.submit(lambda: None)
    await asyncio.sleep(1)
    assert (loop.progress.steps, loop.progress.is_busy) == (3, False)
    turns = loop.progress.turns
    await loop.call(lambda: 7)
    assert loop.progress.turns > turns


@in_virtual_time
async def test_a_run_is_one_boundary_and_counts_its_steps() -> None:
    engine = Engine(10)
    loop = SimulatedStepLoop(engine, one_ahead=False)
    loop.submit(lambda: None)
    await asyncio.sleep(3.5 * STEP_S)
    assert (loop.progress.steps, loop.progress.is_busy) == (3, True)

    await asyncio.sleep(7 * STEP_S)

    assert engine.events == ["boundary", "schedule", "catch up 9", "finish", "boundary", "schedule"]
    assert loop.progress.steps == 10


@in_virtual_time
async def test_a_call_ends_a_run_with_the_step_in_progress() -> None:
    engine = Engine(10)
    loop = SimulatedStepLoop(engine, one_ahead=False)
    loop.submit(lambda: None)
    await asyncio.sleep(3.5 * STEP_S)

    await loop.call(lambda: engine.events.append("call"))

    assert asyncio.get_running_loop().time() == pytest.approx(4 * STEP_S)
    assert engine.events == ["boundary", "schedule", "catch up 3", "finish", "call", "boundary", "schedule"]
    assert loop.progress.steps == 4


@in_virtual_time
async def test_a_run_reports_after_the_steps_that_it_names_as_long_as_they_come() -> None:
    engine = Engine(10, reports=(1, 4, 7))
    loop = SimulatedStepLoop(engine, one_ahead=False)
    loop.submit(lambda: None)
    await asyncio.sleep(5.5 * STEP_S)
    loop.cut_run()

    await asyncio.sleep(0.9 * STEP_S)

    assert engine.reported == pytest.approx([0.0, 2 * STEP_S, 5 * STEP_S, 6 * STEP_S])
    assert loop.run is None


@in_virtual_time
async def test_no_run_is_planned_with_asynchronous_scheduling() -> None:
    engine = Engine(10)
    loop = SimulatedStepLoop(engine, one_ahead=True)
    loop.submit(lambda: None)

    await asyncio.sleep(1)

    assert engine.runs == [10]
