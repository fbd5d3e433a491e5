"""The manager as a whole: dead and silent instances, take-over, requests of other API servers."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pd_serve.comm.membership import Membership
from pd_serve.comm.messages import SetDraining
from pd_serve.comm.requests import (
    DrainInstance,
    RestartInstances,
    ScalePools,
)
from pd_serve.comm.timing import API_SERVER_LEASE_S, HEARTBEAT_S, INSTANCE_LEASE_S, TERM_CHECK_S
from pd_serve.manager.launcher import ManagerNotes
from tests.members import instance_info
from tests.unit.pd_serve.manager.manager_world import START_S, FakeLauncher, World, a_world
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_silent_instance_is_ended_and_replaced() -> None:
    """Its process may hang: it must not come back to life with its old requests."""
    async with a_world() as world:
        await asyncio.sleep(100)
        world.silent.add("decode-0")
        await asyncio.sleep(INSTANCE_LEASE_S + 2 * HEARTBEAT_S)
        assert world.launcher.stopped == ["decode-0"]
        assert "decode-0 has reported nothing for 30 s" in world.notices.warnings[-1]
        await asyncio.sleep(START_S + 1)
        assert world.names == ["decode-1", "decode-2", "prefill-0"]


@in_virtual_time
async def test_the_instances_are_watched_on_when_a_call_of_the_platform_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_world() as world:
        await asyncio.sleep(100)
        keep_notes = world.launcher.keep_notes

        async def fails(notes: ManagerNotes) -> int:
            monkeypatch.setattr(world.launcher, "keep_notes", keep_notes)
            raise OSError("no connection")

        monkeypatch.setattr(world.launcher, "keep_notes", fails)
        world.silent.add("decode-0")
        await asyncio.sleep(INSTANCE_LEASE_S + START_S + 5)
        assert world.names == ["decode-1", "decode-2", "prefill-0"]
        assert "no connection" in world.manager.state().problems[0]


@in_virtual_time
async def test_an_instance_whose_engine_hangs_is_ended_and_replaced_although_it_reports() -> None:
    async with a_world() as world:
        await asyncio.sleep(100)
        world.hanging.add("decode-0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert world.launcher.stopped == ["decode-0"]
        assert "decode-0 hangs in a step of its engine" in world.notices.warnings[-1]
        await asyncio.sleep(START_S + 1)
        assert world.names == ["decode-1", "decode-2", "prefill-0"]


@in_virtual_time
async def test_an_instance_that_is_lost_twice_is_replaced_once() -> None:
    async with a_world() as world:
        await asyncio.sleep(100)
        world.launcher.on_lost("decode-0")
        world.launcher.on_lost("decode-0")
        await asyncio.sleep(START_S + 1)
        assert world.names == ["decode-1", "decode-2", "prefill-0"]


@in_virtual_time
async def test_an_instance_keeps_the_notes_as_soon_as_its_process_is_there() -> None:
    """All others may die, and the manager, before it is ready: the next manager finds it alone."""
    async with a_world() as world:
        await asyncio.sleep(100)
        world.launcher.on_lost("decode-0")
        while "decode-2" not in world.launcher.launched:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert "decode-2" in world.launcher.keepers


@in_virtual_time
async def test_a_bug_in_a_handler_is_counted_and_shown() -> None:
    async with a_world() as world:
        world.wire.failures.record("handling Join from api", KeyError("x"))
        (problem,) = world.manager.state().problems
        assert "handling Join from api failed: KeyError: 'x' (1 times)" in problem


def leave(before: Callable[[World], Any]) -> tuple[list[str], ManagerNotes]:
    """What a manager leaves: its instances and its notes."""
    left: list[Any] = []

    @in_virtual_time
    async def first() -> None:
        async with a_world() as world:
            await before(world)
            await asyncio.sleep(100)
            left.extend([world.names, world.launcher.notes])

    first()
    return left[0], left[1]


class TestTakeOver:
    @staticmethod
    async def take_over(names: list[str], notes: ManagerNotes | None) -> World:
        launcher = FakeLauncher()
        launcher.found, launcher.notes = [instance_info(name) for name in names], notes
        world = World(launcher=launcher)
        assert await world.manager.take_over()
        return world

    def test_the_next_manager_keeps_the_instances_and_the_wanted_sizes(self) -> None:
        names, notes = leave(lambda world: world.call(ScalePools({"decode": 3})))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over([name for name in names if name != "decode-2"], notes)
            assert world.names == ["decode-0", "decode-1", "prefill-0"]
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-3", "prefill-0"], "an id is used once"
            await world.close()

        second()

    def test_the_next_manager_ends_the_newest_instances_of_a_pool_that_is_too_large(self) -> None:
        """Two managers that worked at the same time have each started one in the place of another."""
        names, notes = leave(lambda world: asyncio.sleep(0))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over([*names, "decode-7", "decode-9"], notes)
            await asyncio.sleep(10)
            assert world.names == ["decode-0", "decode-1", "prefill-0"]
            assert sorted(world.launcher.stopped) == ["decode-7", "decode-9"]
            await world.close()

        second()

    def test_the_next_manager_has_a_higher_term_which_the_instances_keep_first(self) -> None:
        names, notes = leave(lambda world: asyncio.sleep(0))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            assert world.launcher.notes is not None
            assert world.launcher.notes.term == world.members.term > notes.term
            await asyncio.sleep(1)
            assert world.sent(Membership, "decode-0")[-1].term == world.members.term
            await world.close()

        second()

    def test_the_next_manager_keeps_the_drains_of_the_operator(self) -> None:
        names, notes = leave(lambda world: world.call(DrainInstance("decode-1", True, False)))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            world.drain_by_scheduler("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(60)
            assert not world.launcher.stopped
            await world.close()

        second()

    def test_the_next_manager_goes_on_stopping_what_the_operator_stops(self) -> None:
        async def drain_a_busy_one(world: World) -> None:
            world.busy.add("decode-1")
            await world.call(DrainInstance("decode-1", True, True))

        names, notes = leave(drain_a_busy_one)
        assert "decode-1" in names

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            world.drain_by_scheduler("decode-1")
            await asyncio.sleep(60)
            assert world.launcher.stopped == ["decode-1"]
            assert world.names == ["decode-0", "prefill-0"]
            await world.close()

        second()

    @pytest.mark.parametrize("after_s", [1.0, START_S + 3, 2 * START_S + 3])
    def test_the_next_manager_goes_on_with_a_rolling_restart(self, after_s: float) -> None:
        """Its predecessor died while it started the first replacement, drained, or was at the second."""
        left: list[Any] = []

        @in_virtual_time
        async def first() -> None:
            async with a_world() as world:
                world.busy.update(("prefill-0", "decode-0") if after_s < 2 * START_S else ("decode-0",))
                await world.call(RestartInstances())
                await asyncio.sleep(after_s)
                left.extend([world.names, world.launcher.notes])

        first()

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(left[0], left[1])
            assert world.manager.state().restart.running
            for name in left[1].stopping:
                world.drain_by_scheduler(name)
            await asyncio.sleep(10 * START_S)
            assert world.manager.state().restart.progress == "3 of 3 done"
            assert [name.split("-")[0] for name in world.names] == ["decode", "decode", "prefill"]
            assert not {"prefill-0", "decode-0", "decode-1"} & set(world.names)
            await world.close()

        second()

    def test_the_next_manager_counts_a_stop_by_the_operator_once(self) -> None:
        async def stop_a_busy_one(world: World) -> None:
            world.busy.add("decode-1")
            await world.call(DrainInstance("decode-1", True, True))

        names, notes = leave(stop_a_busy_one)

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            world.busy.add("decode-1")
            await asyncio.sleep(1)
            await world.call(DrainInstance("decode-1", True, True))
            await world.call(DrainInstance("decode-1", False, False))
            await asyncio.sleep(1)
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted["decode"] == 2
            await world.close()

        second()

    def test_the_next_manager_repeats_the_order_to_drain_that_its_predecessor_could_not_send(self) -> None:
        names, notes = leave(lambda world: world.call(DrainInstance("decode-1", True, False)))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            await asyncio.sleep(HEARTBEAT_S)
            assert world.sent(SetDraining, "decode-1") == [SetDraining(True, by_operator=True)]
            await world.close()

        second()

    def test_the_next_manager_forgets_what_concerns_an_instance_that_has_died_before(self) -> None:
        async def before(world: World) -> None:
            world.busy.update(("decode-0", "decode-1"))
            await world.call(DrainInstance("decode-1", True, True))

        names, notes = leave(before)
        assert (notes.drained_by_operator, notes.stopping) == (["decode-1"], ["decode-1"])

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over([name for name in names if name != "decode-1"], notes)
            await asyncio.sleep(HEARTBEAT_S)
            assert world.launcher.notes is not None
            assert world.launcher.notes.drained_by_operator == world.launcher.notes.stopping == []
            assert world.launcher.notes.stopped == {}
            await world.close()

        second()

    def test_the_next_manager_uses_no_id_of_an_instance_again_that_the_notes_lack(self) -> None:
        """Its predecessor has started it, and died before the notes were kept."""
        names, notes = leave(lambda world: asyncio.sleep(0))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over([*names, "decode-2"], notes)
            await world.call(ScalePools({"decode": 4}))
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-2", "decode-3", "prefill-0"]
            started = [line.split()[0] for line in world.decisions if "is started" in line]
            assert started == ["decode-3"]
            await world.close()

        second()

    def test_of_two_managers_that_take_over_at_the_same_time_one_stays(self) -> None:
        """Both find the notes of the same predecessor, and have the instances keep theirs."""
        names, notes = leave(lambda world: asyncio.sleep(0))

        @in_virtual_time
        async def both() -> None:
            launcher = FakeLauncher()
            launcher.found, launcher.notes = [instance_info(name) for name in names], notes
            launcher.find_s = 1.0
            worlds = [World(launcher=launcher) for _ in range(2)]
            await asyncio.gather(*(world.manager.take_over() for world in worlds))
            await asyncio.sleep(2 * TERM_CHECK_S)
            first, second = sorted(worlds, key=lambda world: world.members.term)
            assert first.manager.is_superseded
            assert not second.manager.is_superseded
            assert launcher.notes is not None
            assert launcher.notes.term == second.members.term
            for world in worlds:
                await world.close()

        both()

    @in_virtual_time
    async def test_a_manager_that_no_other_process_hears_ends_no_silent_instance(self) -> None:
        """API servers find it by its name, and instances by its messages only."""
        async with a_world() as world:
            await asyncio.sleep(100)
            world.silent.update(world.names)
            world.scheduler_hangs = True
            world.known_term = world.members.term - 1
            await asyncio.sleep(3 * INSTANCE_LEASE_S)
            assert world.launcher.stopped == []
            world.known_term = 0
            await asyncio.sleep(INSTANCE_LEASE_S + 3 * HEARTBEAT_S)
            assert sorted(world.launcher.stopped) == ["decode-0", "decode-1", "prefill-0"]

    @in_virtual_time
    async def test_a_manager_that_finds_no_instance_has_a_later_term_than_those_before(self) -> None:
        """API servers that have outlived all instances would ignore it otherwise."""
        async with a_world() as world:
            assert abs(world.members.term / 1e6 - time.time()) < 3600

    @in_virtual_time
    async def test_a_manager_whose_clock_is_behind_exceeds_the_term_that_api_servers_know(self) -> None:
        """The last manager and all its instances have died, and the clock was set back, by an hour."""
        async with a_world() as world:
            world.known_term = world.members.term + 3_600_000_000
            await asyncio.sleep(5)
            assert world.members.term > world.known_term
            assert world.launcher.notes is not None
            assert world.launcher.notes.term == world.members.term
            assert world.sent(Membership, "api")[-1].term == world.members.term
            assert world.notices.warnings == []

    @in_virtual_time
    async def test_a_manager_whose_instances_know_a_later_one_ends_and_exceeds_nobody(self) -> None:
        async with a_world() as world:
            term = world.members.term
            assert world.launcher.notes is not None
            world.launcher.notes = replace(world.launcher.notes, term=term + 7)
            world.known_term = term + 7
            await asyncio.sleep(5)
            assert world.notices.warnings == ["another manager has taken over; this one ends"]
            assert world.members.term == term

    def test_the_next_manager_keeps_the_api_servers_for_the_time_of_their_lease(self) -> None:
        """Instances end the requests of an API server that is no member. It has yet to find the manager."""
        names, notes = leave(lambda world: asyncio.sleep(0))

        @in_virtual_time
        async def second() -> None:
            world = await self.take_over(names, notes)
            world.joined.clear()
            await asyncio.sleep(API_SERVER_LEASE_S - 1)
            told = world.sent(Membership, "decode-0")
            assert told
            assert all(list(message.api_servers) == ["api"] for message in told)
            await asyncio.sleep(3)
            assert world.sent(Membership, "decode-0")[-1].api_servers == {}
            await world.close()

        second()

    @in_virtual_time
    async def test_a_superseded_manager_ends_itself_before_it_ends_an_instance_or_starts_a_scheduler(
        self,
    ) -> None:
        """It was cut off, and so it hears of no instance any more."""
        async with a_world() as world:
            await asyncio.sleep(100)
            world.supersede()
            world.silent.update(world.names)
            world.joined.clear()
            starts = world.launcher.scheduler_starts
            world.launcher.scheduler_dead.set()
            await asyncio.sleep(3 * INSTANCE_LEASE_S)
            assert world.launcher.stopped == []
            assert world.launcher.scheduler_starts == starts
            assert world.notices.warnings[-1] == "another manager has taken over; this one ends"

    @in_virtual_time
    async def test_a_superseded_manager_ends_no_instance_that_is_drained_and_empty(self) -> None:
        """Its report is late: the next manager uses the instance again."""
        async with a_world() as world:
            world.busy.add("decode-1")
            await world.call(DrainInstance("decode-1", True, True))
            await asyncio.sleep(1)
            world.supersede()
            world.busy.clear()
            await asyncio.sleep(5)
            assert world.notices.warnings[-1] == "another manager has taken over; this one ends"
            assert world.launcher.stopped == []

    @in_virtual_time
    async def test_a_superseded_manager_ends_no_instance_that_it_was_starting(self) -> None:
        """The next manager may have adopted it."""
        async with a_world() as world:
            await asyncio.sleep(100)
            world.launcher.waits.add("decode-2")  # the instance that is started next
            world.launcher.on_lost("decode-1")
            await asyncio.sleep(START_S + 2)
            world.supersede()
            world.launcher.on_lost("decode-0")  # has the manager keep notes, and so see the later term
            await asyncio.sleep(5)
            assert world.notices.warnings[-1] == "another manager has taken over; this one ends"
            assert world.launcher.stopped == []

    @in_virtual_time
    async def test_take_over_returns_false_without_instances(self) -> None:
        world = World()
        assert not await world.manager.take_over()
        await world.close()
