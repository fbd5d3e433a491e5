"""Instances that start, fail to start, and are started again."""

import asyncio

import pytest

from pd_serve.comm.membership import Membership
from pd_serve.comm.timing import (
    HEARTBEAT_S,
    MAX_DEATH_PAUSE_S,
    MAX_START_BACKOFF_S,
    ORPHAN_S,
    RECOVERY_S,
    START_BACKOFF_S,
    START_TIMEOUT_S,
)
from pd_serve.errors import EngineDeadError
from tests.unit.pd_serve.manager.manager_world import DEAD, START_S, World, a_world
from tests.virtual_time import in_virtual_time


class TestFirstInstances:
    @in_virtual_time
    async def test_a_failed_first_instance_ends_the_start_of_the_service(self) -> None:
        world = World()
        world.launcher.fails = EngineDeadError("decode-0 does not start: no such dtype")
        with pytest.raises(EngineDeadError, match="no such dtype"):
            await world.manager.start()
        await world.close()

    @in_virtual_time
    async def test_the_service_starts_without_instances_that_wait_for_resources(self) -> None:
        world = World()
        world.launcher.waits.add("decode-1")
        await world.manager.start()
        assert world.names == ["decode-0", "prefill-0"]
        (row,) = world.manager.state().starting
        assert (row.id, row.role, row.state) == ("decode-1", "decode", "waiting for resources: 1 GPU")
        world.launcher.waits.clear()
        await asyncio.sleep(2)
        assert world.names == ["decode-0", "decode-1", "prefill-0"]
        await world.close()

    @in_virtual_time
    async def test_an_instance_that_is_ready_long_before_the_others_hears_of_its_manager(self) -> None:
        """Otherwise it would end itself after `ORPHAN_S`."""
        world = World()
        world.launcher.start_s["decode-1"] = 2 * ORPHAN_S
        start = asyncio.create_task(world.manager.start())
        await asyncio.sleep(ORPHAN_S)
        assert not start.done()
        assert len(world.sent(Membership, "decode-0")) > ORPHAN_S / HEARTBEAT_S / 2
        await start
        await world.close()

    @in_virtual_time
    async def test_an_instance_that_waits_too_long_for_resources_is_started_again(self) -> None:
        world = World()
        world.launcher.waits.add("decode-1")
        await world.manager.start()
        await asyncio.sleep(START_TIMEOUT_S + 100)
        assert "decode-1 has not started: waiting for resources: 1 GPU" in world.decisions
        assert world.names == ["decode-0", "decode-2", "prefill-0"]
        await world.close()

    @in_virtual_time
    async def test_one_whose_start_fails_in_an_unforeseen_way_is_started_again(self) -> None:
        world = World()
        world.launcher.waits.add("decode-1")
        await world.manager.start()
        world.launcher.fails = OSError("no file descriptors are left")
        world.launcher.waits.clear()
        await asyncio.sleep(START_S)
        world.launcher.fails = None
        await asyncio.sleep(10 * START_S)
        assert world.names == ["decode-0", "decode-2", "prefill-0"]
        await world.close()


class TestForTheScheduler:
    @in_virtual_time
    async def test_an_instance_counts_as_starting_until_it_reports(self) -> None:
        async with a_world() as world:
            world.silent.add("decode-2")
            world.want_one()
            assert world.members.starting == {"decode": 1}
            (row,) = world.manager.state().starting
            assert (row.id, row.state) == ("decode-2", "starting")
            await asyncio.sleep(START_S + 1)
            assert "decode-2" in world.names
            assert world.members.starting == {"decode": 1}
            assert world.manager.state().starting == []
            world.report("decode-2")
            await asyncio.sleep(1)
            assert world.members.starting == {}
            assert world.decisions == ["decode-2 is started: it is too full"]

    @in_virtual_time
    async def test_an_instance_that_is_ready_in_time_and_reports_later_is_not_started_again(self) -> None:
        async with a_world() as world:
            world.launcher.start_s["decode-2"] = START_TIMEOUT_S - 1
            world.launcher.on_lost("decode-1")
            world.silent.add("decode-2")
            await asyncio.sleep(START_TIMEOUT_S + START_BACKOFF_S)
            world.silent.clear()
            await asyncio.sleep(MAX_START_BACKOFF_S)
            assert world.names == ["decode-0", "decode-2", "prefill-0"]

    @in_virtual_time
    async def test_the_scheduler_gets_no_more_instances_than_the_maximum(self) -> None:
        async with a_world() as world:
            world.want_one(times=5)
            await asyncio.sleep(START_S + 1)
            assert len(world.names) == 5
            world.want_one()
            assert len(world.decisions) == 2

    @in_virtual_time
    async def test_the_id_of_a_dead_instance_is_not_used_again(self) -> None:
        async with a_world() as world:
            world.launcher.on_lost("decode-1")
            world.want_one()
            await asyncio.sleep(START_S + 10)
            assert "decode-1" not in world.names
            assert "decode-2" in world.names

    @pytest.mark.parametrize(
        "error", [EngineDeadError("no memory is left"), TimeoutError(), ValueError("a bug")]
    )
    def test_a_failed_start_is_one_decision(self, error: Exception) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world() as world:
                world.launcher.fails = error
                world.want_one()
                await asyncio.sleep(START_S + 1)
                assert len(world.names) == 3
                assert world.decisions[0].startswith("decode-2 has not started: ")
                assert str(error) in world.decisions[0]
                assert world.members.starting == {}

        test()

    @in_virtual_time
    async def test_the_backoff_grows_with_failed_starts_up_to_its_maximum(self) -> None:
        async with a_world() as world:
            world.launcher.fails = EngineDeadError("no GPU is free")
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < began + 20 * MAX_START_BACKOFF_S:
                world.want_one()
                await asyncio.sleep(1)
            tries = int(world.decisions[0].split()[0].removeprefix("decode-")) - 1
            assert 30 < tries < 50, "two at a time"

    @in_virtual_time
    async def test_the_backoff_is_short_after_one_failure(self) -> None:
        async with a_world() as world:
            world.launcher.fails = EngineDeadError("it passes")
            world.want_one()
            await asyncio.sleep(START_S + START_BACKOFF_S + 0.1)
            world.launcher.fails = None
            world.want_one()
            await asyncio.sleep(START_S + 1)
            assert len(world.names) == 4

    @in_virtual_time
    async def test_failures_of_one_role_do_not_delay_another(self) -> None:
        async with a_world() as world:
            world.launcher.fails = DEAD
            world.want_one()
            await asyncio.sleep(START_S + 1)
            world.launcher.fails = None
            world.want_one("decode")
            world.want_one("prefill")
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


class TestAfterDeaths:
    @in_virtual_time
    async def test_a_pause_after_early_deaths_is_longer_but_no_outage(self) -> None:
        async with a_world() as world:
            await asyncio.sleep(100)
            for _ in range(20):
                newest = max(world.names, key=lambda name: (name.startswith("decode"), name))
                world.launcher.on_lost(newest)
                while len(world.names) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(1)
                await asyncio.sleep(2)
            began = asyncio.get_running_loop().time()
            world.launcher.on_lost(world.names[1])
            while len(world.names) < 3:  # noqa: ASYNC110
                await asyncio.sleep(1)
            waited_s = asyncio.get_running_loop().time() - began
            assert MAX_DEATH_PAUSE_S <= waited_s <= MAX_DEATH_PAUSE_S + START_S + 2 < RECOVERY_S
