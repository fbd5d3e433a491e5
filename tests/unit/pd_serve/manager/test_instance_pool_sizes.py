"""Pools keep their size, get another one by hand, are renewed, and are found again by the next owner."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pd_serve.errors import EngineDeadError, InvalidRequestError, MigrationRefusedError
from pd_serve.manager.instance_pool import LIFE_S, RETRY_S, InstancePool
from router.load import InstanceLoad
from router.scaling import PoolBounds
from tests.unit.pd_serve.manager.test_instance_pool import START_S, FakeRouter
from tests.virtual_time import in_virtual_time


class World:
    """One prefill and two decode instances, which report at once, and are empty as soon as they drain."""

    def __init__(self, autoscale: dict[str, PoolBounds] | None = None) -> None:
        self.router = FakeRouter()
        self.stopped: list[str] = []
        self.fails: Exception | None = None
        self.waits: set[str] = set()
        self.least = 3  # instances that were there at any time
        self.fleet = InstancePool(
            self.router,  # type: ignore[arg-type]
            self.start,
            self.stop,
            max_instances=4,
            instances={"prefill": 1, "decode": 2, "neutral": 0},
            autoscale=autoscale,
            replaces=True,
            waits_for=lambda name: "waiting for resources: 1 GPU" if name in self.waits else "",
        )

    async def begin(self) -> None:
        await self.fleet.fill([("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode")])

    async def start(self, name: str, role: str) -> Any:
        await asyncio.sleep(START_S)
        while name in self.waits:  # noqa: ASYNC110
            await asyncio.sleep(1)
        if self.fails is not None:
            raise self.fails
        self.router.loads[name] = InstanceLoad(name, role)
        return SimpleNamespace(instance_id=name, role=role)

    async def stop(self, name: str) -> None:
        self.stopped.append(name)
        self.least = min(self.least, len(self.names))

    async def obey(self) -> None:
        """Instances do what they are told."""
        while True:
            await asyncio.sleep(0.01)
            for name, message in self.router.instances.sent:
                if name in self.router.loads:
                    role = self.router.loads[name].role
                    self.router.loads[name] = InstanceLoad(name, role, draining=message.draining)  # type: ignore[attr-defined]
            self.router.instances.sent.clear()

    @property
    def names(self) -> list[str]:
        return sorted(self.router.instances.infos)

    @property
    def decisions(self) -> list[str]:
        return [decision["what"] for decision in self.fleet.state()["decisions"]]


@asynccontextmanager
async def a_world(autoscale: dict[str, PoolBounds] | None = None) -> AsyncIterator[World]:
    world = World(autoscale)
    obeying = asyncio.create_task(world.obey())
    try:
        await world.begin()
        yield world
    finally:
        obeying.cancel()
        await world.fleet.close()


class TestBeginning:
    @in_virtual_time
    async def test_a_failure_is_the_callers(self) -> None:
        world = World()
        world.fails = EngineDeadError("decode-0 does not start: no such dtype")
        with pytest.raises(EngineDeadError, match="no such dtype"):
            await world.begin()
        await world.fleet.close()

    @in_virtual_time
    async def test_does_not_wait_for_resources_if_the_others_can_serve(self) -> None:
        world = World()
        world.waits.add("decode-1")
        await world.begin()
        assert world.names == ["decode-0", "prefill-0"]
        (row,) = world.fleet.state()["coming"]
        assert row == {"id": "decode-1", "role": "decode", "state": "waiting for resources: 1 GPU"}
        world.waits.clear()
        await asyncio.sleep(2)
        assert world.names == ["decode-0", "decode-1", "prefill-0"]
        await world.fleet.close()

    @in_virtual_time
    async def test_waiting_for_resources_has_an_end_and_another_try(self) -> None:
        world = World()
        world.waits |= {"decode-1"}
        await world.begin()
        await asyncio.sleep(700)
        assert "decode-1 has not started: waiting for resources: 1 GPU" in world.decisions
        assert world.names == ["decode-0", "decode-2", "prefill-0"]
        await world.fleet.close()


class TestReplacing:
    @in_virtual_time
    async def test_a_dead_one(self) -> None:
        async with a_world() as world:
            await asyncio.sleep(LIFE_S + 1)
            world.fleet.lost("decode-0")
            assert world.names == ["decode-1", "prefill-0"]
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-1", "decode-2", "prefill-0"]
            assert world.decisions == ["decode-2 is started: in the place of decode-0, which has died"]

    @in_virtual_time
    async def test_one_that_dies_at_once_waits(self) -> None:
        async with a_world() as world:
            world.fleet.lost("decode-0")
            await asyncio.sleep(RETRY_S - 0.1)
            assert not [row for row in world.fleet.state()["coming"] if row["id"]]
            assert "to be started" in world.fleet.state()["coming"][0]["state"]
            await asyncio.sleep(START_S + 1)
            assert "decode-2" in world.names

    @in_virtual_time
    async def test_is_tried_until_it_succeeds(self) -> None:
        async with a_world() as world:
            world.fails = EngineDeadError("no memory is left")
            world.fleet.lost("decode-0")
            await asyncio.sleep(100)
            assert len(world.names) == 2
            world.fails = None
            await asyncio.sleep(200)
            assert len(world.names) == 3

    @in_virtual_time
    async def test_not_what_the_scheduler_scales_nor_what_was_going(self) -> None:
        async with a_world({"decode": PoolBounds(1, 2)}) as world:
            world.fleet.lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]
        async with a_world() as world:
            world.router.busy.add("decode-0")
            world.fleet.drain("decode-0", stop=True)
            world.fleet.lost("decode-0")
            await asyncio.sleep(100)
            assert world.names == ["decode-1", "prefill-0"]


class TestScaling:
    @in_virtual_time
    async def test_up_and_down(self) -> None:
        async with a_world() as world:
            world.fleet.scale({"decode": 4})
            world.fleet.scale({"decode": 4})
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-2", "decode-3", "prefill-0"]
            world.fleet.scale({"decode": 1})
            await asyncio.sleep(1)
            assert len(world.names) == 2
            assert len(world.stopped) == 3
            world.fleet.lost(world.names[0])
            await asyncio.sleep(100)
            assert len(world.names) == 2

    @in_virtual_time
    async def test_down_while_another_is_still_owed(self) -> None:
        async with a_world() as world:
            world.fleet.lost("decode-0")
            world.fleet.scale({"decode": 1})
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
    def test_what_is_refused(self, sizes: dict[str, int], error: type[Exception], says: str) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world({"decode": PoolBounds(1, 3)}) as world:
                with pytest.raises(error, match=says):
                    world.fleet.scale(sizes)
                assert not world.decisions

        test()


class TestRestarting:
    @in_virtual_time
    async def test_each_is_renewed_and_never_one_too_few(self) -> None:
        async with a_world() as world:
            world.fleet.restart()
            with pytest.raises(MigrationRefusedError, match="under way: begins"):
                world.fleet.restart()
            await asyncio.sleep(4 * START_S)
            assert world.names == ["decode-2", "decode-3", "prefill-1"]
            assert world.stopped == ["prefill-0", "decode-0", "decode-1"]
            assert world.least == 3
            assert world.fleet.state()["restart"] == {"running": False, "progress": "3 of 3 done"}

    @in_virtual_time
    async def test_is_given_up_when_a_new_one_does_not_start(self) -> None:
        async with a_world() as world:
            world.fails = EngineDeadError("no memory is left")
            world.fleet.restart()
            await asyncio.sleep(4 * START_S)
            assert world.names == ["decode-0", "decode-1", "prefill-0"]
            assert "given up after 0 of 3" in world.fleet.state()["restart"]["progress"]


def hand_over(before: Callable[[World], None]) -> tuple[list[Any], dict[str, Any]]:
    """What an owner leaves: its instances and its notes."""
    left: list[Any] = []

    @in_virtual_time
    async def first() -> None:
        async with a_world() as world:
            before(world)
            await asyncio.sleep(100)
            left.extend([list(world.router.instances.infos.values()), world.fleet.notes()])

    first()
    return left[0], left[1]


class TestTheNextOwner:
    def test_goes_on_with_what_there_is(self) -> None:
        infos, notes = hand_over(lambda world: world.fleet.scale({"decode": 3}))

        @in_virtual_time
        async def second() -> None:
            world = World()
            lost = [info for info in infos if info.instance_id != "decode-2"]
            world.fleet.take_over(lost, notes)
            assert world.names == ["decode-0", "decode-1", "prefill-0"]
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-3", "prefill-0"], "an id is used once"
            await world.fleet.close()

        second()
