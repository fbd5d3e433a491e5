"""Pools keep their wanted size, and get another one from the operator."""

import asyncio

import pytest

from pd_serve.comm.requests import DrainInstance, ScalePools
from pd_serve.comm.timing import EARLY_DEATH_S, START_BACKOFF_S
from pd_serve.errors import InvalidRequestError, MigrationRefusedError
from router.scaling import PoolBounds
from tests.unit.pd_serve.manager.manager_world import DEAD, START_S, a_world
from tests.virtual_time import in_virtual_time


class TestReplacing:
    @in_virtual_time
    async def test_another_instance_is_started_in_place_of_a_dead_one(self) -> None:
        async with a_world() as world:
            await asyncio.sleep(EARLY_DEATH_S + 1)
            world.launcher.on_lost("decode-0")
            assert world.names == ["decode-1", "prefill-0"]
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-1", "decode-2", "prefill-0"]
            assert world.decisions == ["decode-2 is started: in the place of decode-0, which has died"]

    @in_virtual_time
    async def test_after_an_early_death_the_start_waits(self) -> None:
        async with a_world() as world:
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(START_BACKOFF_S - 0.1)
            (row,) = world.manager.state().starting
            assert (row.id, row.state[:13]) == ("", "to be started")
            await asyncio.sleep(START_S + 1)
            assert "decode-2" in world.names

    @in_virtual_time
    async def test_the_start_is_repeated_until_it_succeeds(self) -> None:
        async with a_world() as world:
            world.launcher.fails = DEAD
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert len(world.names) == 2
            world.launcher.fails = None
            await asyncio.sleep(200)
            assert len(world.names) == 3

    @in_virtual_time
    async def test_in_a_pool_that_the_scheduler_scales_no_instance_is_replaced(self) -> None:
        async with a_world({"decode": PoolBounds(1, 2)}) as world:
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]

    @in_virtual_time
    async def test_an_instance_that_was_to_be_stopped_is_not_replaced(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            await world.call(DrainInstance("decode-0", True, True))
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]


class TestScaling:
    @in_virtual_time
    async def test_pools_grow_and_shrink(self) -> None:
        async with a_world() as world:
            await world.call(ScalePools({"decode": 4}))
            await world.call(ScalePools({"decode": 4}))
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-2", "decode-3", "prefill-0"]
            await world.call(ScalePools({"decode": 1}))
            await asyncio.sleep(1)
            assert len(world.names) == 2
            assert len(world.launcher.stopped) == 3
            world.launcher.on_lost(world.names[0])
            await asyncio.sleep(100)
            assert len(world.names) == 2

    @in_virtual_time
    async def test_a_start_that_has_not_begun_is_taken_back_first(self) -> None:
        async with a_world() as world:
            world.launcher.on_lost("decode-0")
            await world.call(ScalePools({"decode": 1}))
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]

    @pytest.mark.parametrize(
        ("sizes", "error", "says"),
        [
            ({"encode": 1}, InvalidRequestError, "no role 'encode'; there are prefill"),
            ({"decode": -1}, InvalidRequestError, "negative"),
            ({"decode": 0}, InvalidRequestError, "need each other"),
            ({"prefill": 0}, InvalidRequestError, "no instance would take requests"),
            ({"decode": 4}, MigrationRefusedError, "scales decode instances within 1:3"),
        ],
    )
    def test_sizes_that_cannot_be_are_refused(
        self, sizes: dict[str, int], error: type[Exception], says: str
    ) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world({"decode": PoolBounds(1, 3)}) as world:
                with pytest.raises(error, match=says):
                    await world.call(ScalePools(sizes))
                assert not world.decisions

        test()


class TestStoppingOne:
    @in_virtual_time
    async def test_asked_for_three_times_the_pool_is_one_smaller(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            for _ in range(3):
                await world.call(DrainInstance("decode-0", True, True))
            await asyncio.sleep(1)
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted["decode"] == 1

    @in_virtual_time
    async def test_an_instance_that_is_used_again_counts_again(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            await world.call(DrainInstance("decode-0", True, True))
            for _ in range(2):
                await world.call(DrainInstance("decode-0", False, False))
            await asyncio.sleep(1)
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted["decode"] == 2
