"""Pools keep their wanted sizes, which the operator can change."""

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
    async def test_the_replacement_of_an_instance_that_died_early_waits_for_the_backoff(self) -> None:
        async with a_world() as world:
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(START_BACKOFF_S - 0.1)
            (row,) = world.manager.state().starting
            assert (row.id, row.state[:13]) == ("decode-2", "to be started")
            await asyncio.sleep(START_S + 1)
            assert "decode-2" in world.names

    @in_virtual_time
    async def test_the_start_of_a_replacement_is_repeated_until_it_succeeds(self) -> None:
        async with a_world() as world:
            world.launcher.fails = DEAD
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert len(world.names) == 2
            world.launcher.fails = None
            await asyncio.sleep(200)
            assert len(world.names) == 3

    @in_virtual_time
    async def test_a_dead_instance_of_a_pool_that_the_scheduler_scales_is_not_replaced(self) -> None:
        async with a_world({"decode": PoolBounds(1, 2)}) as world:
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]

    @in_virtual_time
    async def test_a_dead_instance_that_was_leaving_is_not_replaced(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            await world.call(DrainInstance("decode-0", True, True))
            world.launcher.on_lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]

    @in_virtual_time
    async def test_a_scaled_pool_that_has_lost_all_instances_gets_its_lower_bound(self) -> None:
        """Without the scheduler, which may have died with them."""
        async with a_world({"decode": PoolBounds(1, 2)}) as world:
            world.launcher.on_lost("decode-0")
            world.launcher.on_lost("decode-1")
            await asyncio.sleep(10 * START_S)
            assert world.names == ["decode-2", "prefill-0"]

    @in_virtual_time
    async def test_a_dead_instance_is_replaced_in_the_pool_that_it_was_in(self) -> None:
        """The scheduler has made a prefill instance of it."""
        async with a_world() as world:
            await asyncio.sleep(EARLY_DEATH_S)
            world.change_role("decode-1", "prefill")
            await asyncio.sleep(1)
            world.launcher.on_lost("decode-1")
            await asyncio.sleep(2 * START_S)
            assert world.names == ["decode-0", "prefill-0", "prefill-1"]
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted == {"prefill": 2, "decode": 1, "neutral": 0}


class TestScaling:
    @in_virtual_time
    async def test_scale_starts_and_stops_instances(self) -> None:
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
    async def test_a_smaller_size_cancels_queued_starts_first(self) -> None:
        async with a_world() as world:
            world.launcher.on_lost("decode-0")
            await world.call(ScalePools({"decode": 1}))
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]

    @pytest.mark.parametrize(
        ("sizes", "error", "message"),
        [
            ({"encode": 1}, InvalidRequestError, "no role 'encode'; there are prefill"),
            ({"decode": -1}, InvalidRequestError, "negative"),
            ({"decode": 0}, InvalidRequestError, "need each other"),
            ({"prefill": 0}, InvalidRequestError, "no instance would take requests"),
            ({"decode": 4}, MigrationRefusedError, "scales decode instances within 1:3"),
        ],
    )
    def test_invalid_sizes_are_refused(
        self, sizes: dict[str, int], error: type[Exception], message: str
    ) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world({"decode": PoolBounds(1, 3)}) as world:
                with pytest.raises(error, match=message):
                    await world.call(ScalePools(sizes))
                assert not world.decisions

        test()

    @in_virtual_time
    async def test_neutral_instances_take_the_place_of_decode_instances(self) -> None:
        async with a_world() as world:
            await world.call(ScalePools({"neutral": 1, "decode": 0}))
            await asyncio.sleep(2 * START_S)
            assert world.names == ["neutral-0", "prefill-0"]

    @in_virtual_time
    async def test_a_larger_size_uses_leaving_instances_again(self) -> None:
        async with a_world() as world:
            world.busy.update(("decode-0", "decode-1"))
            await world.call(ScalePools({"decode": 1}))
            await asyncio.sleep(1)
            await world.call(ScalePools({"decode": 3}))
            world.busy.clear()
            await asyncio.sleep(2 * START_S)
            assert world.names == ["decode-0", "decode-1", "decode-2", "prefill-0"]
            assert world.launcher.stopped == []


class TestStoppingOne:
    @in_virtual_time
    async def test_an_instance_stopped_three_times_makes_its_pool_smaller_by_one(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            for _ in range(3):
                await world.call(DrainInstance("decode-0", True, True))
            await asyncio.sleep(1)
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted["decode"] == 1

    @in_virtual_time
    async def test_an_instance_that_is_used_again_restores_the_wanted_size(self) -> None:
        async with a_world() as world:
            world.busy.add("decode-0")
            await world.call(DrainInstance("decode-0", True, True))
            for _ in range(2):
                await world.call(DrainInstance("decode-0", False, False))
            await asyncio.sleep(1)
            assert world.launcher.notes is not None
            assert world.launcher.notes.wanted["decode"] == 2


@in_virtual_time
async def test_a_pool_made_smaller_gives_up_its_starts_before_it_stops_instances() -> None:
    """Those that serve would be stopped otherwise, before the others are ready."""
    async with a_world() as world:
        await world.call(ScalePools({"decode": 4}))
        await asyncio.sleep(1)
        await world.call(ScalePools({"decode": 3}))
        await asyncio.sleep(START_S + 1)
        assert world.names == ["decode-0", "decode-1", "decode-2", "prefill-0"]
        await world.call(ScalePools({"decode": 5}))
        await asyncio.sleep(1)
        await world.call(ScalePools({"decode": 1}))
        await asyncio.sleep(START_S + 1)
        assert world.names == ["decode-2", "prefill-0"]
        assert world.members.starting == {}
