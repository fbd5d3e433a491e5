"""The manager starts a scheduler, and another one whenever it has died."""

import asyncio

import pytest

from pd_serve.comm.messages import Decision, SchedulerReport
from pd_serve.comm.timing import (
    MAX_DEATH_PAUSE_S,
    SCHEDULER_HANG_S,
    SCHEDULER_LEASE_S,
    SCHEDULER_START_TIMEOUT_S,
)
from pd_serve.errors import EngineDeadError
from tests.unit.pd_serve.manager.manager_world import World, a_world
from tests.virtual_time import in_virtual_time


def state(world: World) -> tuple[str, int | None, int]:
    scheduler = world.manager.state().scheduler
    return scheduler.state, scheduler.pid, scheduler.restarts


@in_virtual_time
async def test_the_scheduler_is_alive_as_long_as_it_reports() -> None:
    async with a_world() as world:
        world.scheduler_hangs = True
        await asyncio.sleep(SCHEDULER_LEASE_S)
        assert state(world)[0] == "absent"
        assert world.members.scheduler == "tcp://scheduler-1"
        world.wire.hear("scheduler", SchedulerReport([]))
        assert state(world) == ("alive", 1, 0)
        await asyncio.sleep(SCHEDULER_LEASE_S)
        assert state(world)[0] == "absent"
        world.wire.hear("scheduler", SchedulerReport([Decision("decode-0", "is drained", "x")]))
        assert (state(world)[0], world.decisions) == ("alive", ["decode-0 is drained: x"])


@in_virtual_time
async def test_a_dead_scheduler_is_replaced_and_members_get_the_new_address() -> None:
    async with a_world() as world:
        await asyncio.sleep(60)
        world.launcher.scheduler_dead.set()
        await asyncio.sleep(2)
        assert state(world) == ("alive", 2, 1)
        assert world.members.scheduler == "tcp://scheduler-2"
        assert "the scheduler has died" in world.notices.warnings[-1]


@in_virtual_time
async def test_a_scheduler_that_hangs_is_ended_and_replaced() -> None:
    async with a_world() as world:
        await asyncio.sleep(60)
        world.scheduler_hangs = True
        await asyncio.sleep(SCHEDULER_HANG_S + 3)
        world.scheduler_hangs = False
        await asyncio.sleep(2)
        assert state(world) == ("alive", 2, 1)
        assert world.launcher.scheduler_stops == 1
        assert "the scheduler hangs" in world.notices.warnings[-1]
        await asyncio.sleep(10 * SCHEDULER_HANG_S)
        assert world.launcher.scheduler_starts == 2


@in_virtual_time
async def test_the_silence_of_all_is_not_the_scheduler_s() -> None:
    """The manager was suspended, or cut off."""
    async with a_world() as world:
        await asyncio.sleep(60)
        world.scheduler_hangs = True
        world.silent.update(world.names)
        world.joined.clear()
        await asyncio.sleep(10 * SCHEDULER_HANG_S)
        assert world.launcher.scheduler_stops == 0


@in_virtual_time
async def test_a_scheduler_whose_start_hangs_is_ended_and_another_one_started() -> None:
    async with a_world() as world:
        await asyncio.sleep(60)
        world.launcher.scheduler_start_s = 1e6
        world.launcher.scheduler_dead.set()
        await asyncio.sleep(SCHEDULER_START_TIMEOUT_S + 1)
        assert world.launcher.scheduler_stops == 1
        world.launcher.scheduler_start_s = 0.0
        await asyncio.sleep(SCHEDULER_START_TIMEOUT_S + 2 * MAX_DEATH_PAUSE_S)
        assert state(world)[0] == "alive"


@pytest.mark.parametrize("kind", [EngineDeadError, OSError])
@in_virtual_time
async def test_schedulers_that_cannot_start_are_tried_again_with_pauses(kind: type[Exception]) -> None:
    async with a_world() as world:
        world.launcher.scheduler_fails = kind("the scheduler does not start: no memory")
        world.launcher.scheduler_dead.set()
        await asyncio.sleep(300)
        failed = [text for text in world.notices.warnings if "no memory" in text]
        assert 300 / MAX_DEATH_PAUSE_S <= len(failed) < 50
        world.launcher.scheduler_fails = None
        await asyncio.sleep(2 * MAX_DEATH_PAUSE_S)
        assert world.launcher.scheduler_starts == 2
