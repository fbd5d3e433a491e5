"""Instances that the scheduler or the operator drains and stops."""

import asyncio
from collections.abc import Callable

import pytest

from pd_serve.comm.messages import Decision, SchedulerReport, SetDraining
from pd_serve.comm.requests import DrainInstance, ScalePools
from pd_serve.comm.timing import DRAIN_TIMEOUT_S, STOP_PATIENCE_S
from pd_serve.errors import MigrationRefusedError, UnknownTargetError
from router.scaling import PoolBounds
from tests.unit.pd_serve.manager.manager_world import START_S, World, a_world
from tests.virtual_time import in_virtual_time

#: The scheduler decides how many decode instances there are.
SCALED = {"decode": PoolBounds(1, 2)}


class TestForTheScheduler:
    @in_virtual_time
    async def test_an_empty_instance_is_stopped_once(self) -> None:
        async with a_world(SCALED) as world:
            world.drain_by_scheduler("decode-1")
            world.want_stopped("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(1)
            assert (world.names, world.launcher.stopped) == (["decode-0", "prefill-0"], ["decode-1"])
            assert world.decisions == ["decode-1 is stopped: drained and empty"]

    @in_virtual_time
    async def test_a_stop_waits_while_an_api_server_uses_the_instance(self) -> None:
        async with a_world(SCALED) as world:
            world.drain_by_scheduler("decode-1")
            world.busy.add("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(STOP_PATIENCE_S / 2)
            assert not world.launcher.stopped
            world.busy.clear()
            await asyncio.sleep(1)
            assert world.launcher.stopped == ["decode-1"]

    @in_virtual_time
    async def test_a_stop_waits_at_most_its_patience(self) -> None:
        async with a_world(SCALED) as world:
            world.drain_by_scheduler("decode-1")
            world.busy.add("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(STOP_PATIENCE_S + 1)
            assert world.launcher.stopped == ["decode-1"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda world: world.drain_by_scheduler("decode-1", draining=False),
            lambda world: world.launcher.on_lost("decode-1"),
        ],
        ids=["it is used again", "it has died"],
    )
    def test_a_stop_is_given_up_when_the_instance_is_used_again_or_dead(
        self, change: Callable[[World], None]
    ) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world(SCALED) as world:
                world.drain_by_scheduler("decode-1")
                world.busy.add("decode-1")
                world.want_stopped("decode-1")
                await asyncio.sleep(1)
                change(world)
                await asyncio.sleep(2 * STOP_PATIENCE_S)
                assert not world.launcher.stopped

        test()

    @in_virtual_time
    async def test_the_stop_of_an_unknown_instance_is_ignored(self) -> None:
        async with a_world(SCALED) as world:
            world.want_stopped("decode-7")
            await asyncio.sleep(1)
            assert not world.launcher.stopped


class TestForTheOperator:
    @in_virtual_time
    async def test_the_scheduler_cannot_stop_an_instance_that_the_operator_drains(self) -> None:
        async with a_world() as world:
            await world.call(DrainInstance("decode-1", True, False))
            assert world.sent(SetDraining, "decode-1") == [SetDraining(True, by_operator=True)]
            await asyncio.sleep(1)
            world.want_stopped("decode-1")
            again = Decision("decode-1", "is used again", "more would be better")
            world.wire.hear("scheduler", SchedulerReport([again]))
            await asyncio.sleep(2 * STOP_PATIENCE_S)
            assert not world.launcher.stopped
            assert world.decisions == ["decode-1 is drained: requested by the operator"]
            await world.call(DrainInstance("decode-1", False, False))
            assert world.sent(SetDraining, "decode-1")[-1] == SetDraining(False, by_operator=True)

    @in_virtual_time
    async def test_a_stop_by_the_operator_waits_until_the_instance_is_empty_for_a_bounded_time(self) -> None:
        async with a_world() as world:
            world.busy.update(("decode-0", "decode-1"))
            await world.call(ScalePools({"decode": 4}))
            await asyncio.sleep(2 * START_S)
            for name in ("decode-0", "decode-1"):
                await world.call(DrainInstance(name, True, True))
            await asyncio.sleep(DRAIN_TIMEOUT_S / 2)
            assert not world.launcher.stopped
            world.busy.remove("decode-0")
            await asyncio.sleep(1)
            assert world.launcher.stopped == ["decode-0"]
            assert world.decisions[0] == "decode-0 is stopped: drained by the operator"
            await asyncio.sleep(DRAIN_TIMEOUT_S / 2)
            assert world.launcher.stopped == ["decode-0", "decode-1"]
            assert world.names == ["decode-2", "decode-3", "prefill-0"]

    @pytest.mark.parametrize("draining", [True, False])
    @in_virtual_time
    async def test_an_order_that_has_not_reached_its_instance_is_repeated(self, draining: bool) -> None:
        async with a_world() as world:
            if not draining:
                await world.call(DrainInstance("decode-1", True, False))
                await asyncio.sleep(1)
            world.deaf.add("decode-1")
            await world.call(DrainInstance("decode-1", draining, False))
            await asyncio.sleep(1)
            world.deaf.clear()
            await asyncio.sleep(1)
            load = world.manager.register.load_of("decode-1")
            assert load is not None
            assert (load.draining, load.drained_by_operator) == (draining, draining)

    @in_virtual_time
    async def test_an_instance_that_is_used_again_and_drained_at_once_is_not_stopped(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-1")
            await world.call(DrainInstance("decode-1", True, True))
            await asyncio.sleep(1)
            await world.call(DrainInstance("decode-1", False, False))
            await world.call(DrainInstance("decode-1", True, False))
            world.busy.clear()
            await asyncio.sleep(60)
            assert not world.launcher.stopped
            assert world.members.leaving == []

    @in_virtual_time
    async def test_the_operator_keeps_an_instance_that_the_scheduler_stops(self) -> None:
        async with a_world(SCALED) as world:
            world.busy.add("decode-1")
            world.drain_by_scheduler("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(1)
            await world.call(DrainInstance("decode-1", True, False))
            await asyncio.sleep(2 * STOP_PATIENCE_S)
            assert not world.launcher.stopped

    @in_virtual_time
    async def test_an_instance_that_is_used_again_is_not_stopped(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-1")
            await world.call(DrainInstance("decode-1", True, True))
            await asyncio.sleep(1)
            await world.call(DrainInstance("decode-1", False, False))
            world.busy.clear()
            await asyncio.sleep(1)
            assert not world.launcher.stopped

    @in_virtual_time
    async def test_the_last_of_a_role_is_refused_before_the_others_report_that_they_drain(self) -> None:
        async with a_world() as world:
            await world.call(DrainInstance("decode-0", True, False))
            with pytest.raises(MigrationRefusedError, match="the last decode instance"):
                await world.call(DrainInstance("decode-1", True, False))

    @in_virtual_time
    async def test_an_unknown_instance_and_the_last_of_its_role_are_refused(self) -> None:
        async with a_world() as world:
            with pytest.raises(UnknownTargetError):
                await world.call(DrainInstance("decode-7", True, False))
            with pytest.raises(MigrationRefusedError, match="the last instance that takes new requests"):
                await world.call(DrainInstance("prefill-0", True, False))
            await world.call(DrainInstance("decode-0", True, False))
            await asyncio.sleep(1)
            with pytest.raises(MigrationRefusedError, match="the last decode instance"):
                await world.call(DrainInstance("decode-1", True, False))
            assert not world.sent(SetDraining, "decode-1")
