"""Every instance is replaced by a new one, one after another."""

import asyncio

import pytest

from pd_serve.comm.cluster_state import RestartState
from pd_serve.comm.requests import DrainInstance, RestartInstances, ScalePools
from pd_serve.errors import MigrationRefusedError
from tests.unit.pd_serve.manager.manager_world import DEAD, START_S, a_world
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_restart_replaces_every_instance_and_never_has_fewer() -> None:
    async with a_world() as world:
        world.fewest = 3
        await world.call(RestartInstances())
        with pytest.raises(MigrationRefusedError, match="under way: "):
            await world.call(RestartInstances())
        await asyncio.sleep(4 * START_S)
        assert world.names == ["decode-2", "decode-3", "prefill-1"]
        assert world.launcher.stopped == ["prefill-0", "decode-0", "decode-1"]
        assert world.fewest == 3
        assert world.manager.state().restart == RestartState(False, "3 of 3 done")


@in_virtual_time
async def test_a_restart_is_given_up_when_a_new_instance_does_not_start() -> None:
    async with a_world() as world:
        world.launcher.fails = DEAD
        await world.call(RestartInstances())
        await asyncio.sleep(4 * START_S)
        assert world.names == ["decode-0", "decode-1", "prefill-0"]
        assert "given up after 0 of 3" in world.manager.state().restart.progress


@in_virtual_time
async def test_a_restart_is_given_up_when_the_operator_uses_the_old_instance_again() -> None:
    async with a_world() as world:
        world.busy.add("prefill-0")
        await world.call(RestartInstances())
        await asyncio.sleep(START_S + 1)
        await world.call(DrainInstance("prefill-0", False, False))
        await asyncio.sleep(1)
        restart = world.manager.state().restart
        assert (restart.running, "prefill-0 is used again" in restart.progress) == (False, True)
        world.busy.clear()
        await world.call(RestartInstances())


@in_virtual_time
async def test_an_instance_that_the_operator_stops_meanwhile_is_not_replaced() -> None:
    async with a_world() as world:
        world.busy.add("decode-1")
        await world.call(RestartInstances())
        await world.call(DrainInstance("decode-1", True, True))
        await asyncio.sleep(4 * START_S)
        world.busy.clear()
        await asyncio.sleep(4 * START_S)
        assert world.names == ["decode-2", "prefill-1"]


@in_virtual_time
async def test_it_is_given_up_when_a_new_instance_dies_at_once() -> None:
    async with a_world() as world:
        world.silent.add("prefill-1")
        await world.call(RestartInstances())
        await asyncio.sleep(START_S + 0.01)
        world.launcher.on_lost("prefill-1")
        await asyncio.sleep(1)
        assert "prefill-0" in world.names
        assert "given up after 0 of 3: prefill-1 has died" in world.manager.state().restart.progress


@in_virtual_time
async def test_undoing_the_drain_of_a_replaced_instance_leaves_its_pool_with_the_wanted_size() -> None:
    async with a_world() as world:
        world.busy.add("prefill-0")
        await world.call(RestartInstances())
        await asyncio.sleep(START_S + 1)
        assert "prefill-1" in world.names
        await world.call(DrainInstance("prefill-0", False, False))
        await asyncio.sleep(5)
        assert world.names == ["decode-0", "decode-1", "prefill-0"]
        world.busy.clear()
        await world.call(RestartInstances())
        await asyncio.sleep(4 * START_S)
        assert world.names == ["decode-2", "decode-3", "prefill-2"]


@pytest.mark.parametrize("after_s", [1.0, START_S + 2])
def test_a_restart_can_be_cancelled(after_s: float) -> None:
    """While the first replacement starts, and while the first instance drains."""

    @in_virtual_time
    async def test() -> None:
        async with a_world() as world:
            with pytest.raises(MigrationRefusedError, match="no restart is under way"):
                await world.call(RestartInstances(cancel=True))
            world.busy.add("prefill-0")
            await world.call(RestartInstances())
            await asyncio.sleep(after_s)
            await world.call(RestartInstances(cancel=True))
            assert world.manager.state().restart == RestartState(False, "cancelled after 0 of 3")
            await asyncio.sleep(10 * START_S)
            assert world.names == ["decode-0", "decode-1", "prefill-0"]
            assert world.members.leaving == []
            assert world.members.starting == {}

    test()


@in_virtual_time
async def test_the_death_of_an_instance_that_is_being_replaced_starts_no_third_one() -> None:
    async with a_world() as world:
        await asyncio.sleep(100)
        await world.call(RestartInstances())
        await asyncio.sleep(1)
        world.launcher.on_lost("prefill-0")
        await asyncio.sleep(10 * START_S)
        assert world.names == ["decode-2", "decode-3", "prefill-1"]


@in_virtual_time
async def test_a_pool_made_smaller_during_a_restart_has_its_size_afterwards() -> None:
    for after_s in (1.0, START_S + 1, 2 * START_S + 1, 3 * START_S):
        async with a_world() as world:
            world.busy.update(("decode-0", "decode-1"))
            await world.call(RestartInstances())
            await asyncio.sleep(after_s)
            await world.call(ScalePools({"decode": 1}))
            await asyncio.sleep(10)
            world.busy.clear()
            await asyncio.sleep(10 * START_S)
            assert [name.split("-")[0] for name in world.names] == ["decode", "prefill"], after_s
            assert not world.manager.state().restart.running


@in_virtual_time
async def test_stopping_the_instance_that_is_being_replaced_is_refused() -> None:
    async with a_world() as world:
        world.busy.add("prefill-0")
        await world.call(RestartInstances())
        await asyncio.sleep(START_S + 1)
        with pytest.raises(MigrationRefusedError, match="a restart replaces prefill-0"):
            await world.call(DrainInstance("prefill-0", True, True))
