"""Leases that are renewed or expire, and a process that cannot receive messages itself."""

import asyncio

import pytest

from migration.engine_interface import StepProgress
from pd_serve.comm.leases import LeaseClock, Leases, OrphanTimer, StepWatch
from pd_serve.comm.timing import FIRST_STEPS, FIRST_STEPS_S, HEARTBEAT_S, ORPHAN_S, STEP_S
from pd_serve.errors import EngineDeadError
from tests.virtual_time import in_virtual_time

LEASE_S = 5 * HEARTBEAT_S


class World:
    """A process with leases of a and b, which receives a message of another process every second."""

    def __init__(self) -> None:
        self.clock = LeaseClock()
        self.leases = Leases(LEASE_S, self.clock)
        self.leases.renew("a")
        self.leases.renew("b")

    async def watch(self, seconds: float, *renewed: str) -> list[str]:
        """What has expired after this time, in which these names were renewed."""
        for _ in range(round(seconds / HEARTBEAT_S)):
            await asyncio.sleep(HEARTBEAT_S)
            self.clock.on_message()
            for name in renewed:
                self.leases.renew(name)
        return self.leases.expired()


@in_virtual_time
async def test_a_lease_that_is_not_renewed_stays_expired_until_it_is_dropped() -> None:
    world = World()

    assert await world.watch(LEASE_S, "a") == []
    assert await world.watch(2 * HEARTBEAT_S, "a") == ["b"]
    world.leases.drop("b")
    world.leases.drop("never there")
    assert await world.watch(LEASE_S, "a") == []


@pytest.mark.parametrize("checked", [False, True], ids=["suspended", "cut off"])
def test_the_time_in_which_this_process_received_nothing_does_not_count(checked: bool) -> None:
    """Suspended, it does not run at all; cut off, it runs, and looks at its leases."""

    @in_virtual_time
    async def run() -> None:
        world = World()
        await world.watch(HEARTBEAT_S)

        for _ in range(100):
            await asyncio.sleep(LEASE_S / 5)
            assert not checked or world.leases.expired() == []
        world.clock.on_message()

        assert world.leases.expired() == []
        assert await world.watch(LEASE_S, "a") == ["b"]

    run()


def test_an_orphan_ends_itself_after_enough_heartbeats_without_a_message() -> None:
    """Heartbeats of its own, not the clock: a process that was suspended has missed messages, and is none."""
    timer = OrphanTimer("decode-0")
    for _ in range(round(ORPHAN_S / HEARTBEAT_S)):
        timer.on_heartbeat(HEARTBEAT_S)
    timer.on_message()
    for _ in range(round(ORPHAN_S / HEARTBEAT_S)):
        timer.on_heartbeat(HEARTBEAT_S)

    with pytest.raises(EngineDeadError, match="have sent decode-0 anything for 120 s"):
        timer.on_heartbeat(HEARTBEAT_S)


def hangs_after(watch: StepWatch, seconds: float, progress: StepProgress) -> bool:
    """Whether an engine whose progress stays the same for this long hangs."""
    for _ in range(round(seconds / HEARTBEAT_S) + 1):
        watch.on_heartbeat(HEARTBEAT_S, progress)
    return watch.hangs


def test_an_engine_hangs_when_a_step_takes_longer_than_its_bound() -> None:
    watch = StepWatch()

    assert not hangs_after(watch, STEP_S, StepProgress(500, FIRST_STEPS, True))
    assert watch.step_s == STEP_S
    assert hangs_after(watch, HEARTBEAT_S, StepProgress(500, FIRST_STEPS, True))
    assert not hangs_after(watch, STEP_S, StepProgress(501, FIRST_STEPS, True)), "it has gone on"


def test_the_first_steps_may_compile() -> None:
    watch = StepWatch()

    assert not hangs_after(watch, FIRST_STEPS_S, StepProgress(3, FIRST_STEPS - 1, True))
    assert hangs_after(watch, HEARTBEAT_S, StepProgress(3, FIRST_STEPS - 1, True))


def test_an_idle_engine_makes_no_steps_and_is_healthy() -> None:
    watch = StepWatch()

    assert not hangs_after(watch, 10 * FIRST_STEPS_S, StepProgress(500, FIRST_STEPS, False))
    assert watch.step_s == 0
