"""Steps and the calls between them, with and without asynchronous scheduling."""

import asyncio

import pytest

from migration.errors import EngineDeadError
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.batcher import Step
from pd_serve.simulated_engine.step_loop import SimulatedStepLoop
from tests.virtual_time import in_virtual_time

STEP_S = 0.01


class Engine:
    """Does three steps of equal duration and records what happens."""

    def __init__(self) -> None:
        self.left = 3
        self.hangs = False
        self.events: list[str] = []

    def schedule(self) -> Step | None:
        if not self.left:
            return None
        self.left -= 1
        self.events.append("schedule")
        return Step([], [], STEP_S)

    def begin(self, step: Step) -> float:
        return 1e9 if self.hangs else step.duration_s

    def finish(self, step: Step) -> None:
        self.events.append("finish")

    def at_boundary(self) -> None:
        self.events.append("boundary")

    def report(self) -> None:
        pass


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
