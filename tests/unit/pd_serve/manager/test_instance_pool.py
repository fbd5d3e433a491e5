"""What becomes of the scheduler's wishes, and of somebody's: instances that start, fail, empty and stop."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pd_serve.comm.messages import SchedulerReport, SetDraining, StartInstance, StopInstance
from pd_serve.errors import EngineDeadError, MigrationRefusedError, UnknownTargetError
from pd_serve.manager.instance_pool import EMPTY_S, MAX_RETRY_S, RETRY_S, SCHEDULER_LEASE_S, InstancePool
from router.load import InstanceLoad
from tests.virtual_time import in_virtual_time

START_S = 15.0


class FakeInstances:
    """Stands for `InstanceDirectory`."""

    def __init__(self) -> None:
        self.infos: dict[str, Any] = {}
        self.starting: dict[str, int] = {}
        self.greetings: list[dict[str, int]] = []
        self.sent: list[tuple[str, object]] = []
        self.scheduler = ""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.infos.values())

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.infos

    def greet(self) -> None:
        self.greetings.append(dict(self.starting))

    def send(self, instance_id: str, message: object) -> bool:
        self.sent.append((instance_id, message))
        return True

    def introduce_scheduler(self, name: str, address: str) -> None:
        self.scheduler = address


class FakeRouter:
    """Stands for `RequestRouter`: knows loads, and which instances have requests."""

    num_waiting, num_live = 3, 2

    def __init__(self) -> None:
        self.instances = FakeInstances()
        self.loads: dict[str, InstanceLoad] = {}
        self.busy: set[str] = set()
        self.needed: str | None = None

    def join(self, info: Any) -> None:
        self.instances.infos[info.instance_id] = info

    def report(self, name: str, **load: Any) -> None:
        self.loads[name] = InstanceLoad(name, "decode", **load)

    def leave(self, instance_id: str) -> None:
        self.instances.infos.pop(instance_id, None)
        self.loads.pop(instance_id, None)

    def load_of(self, instance_id: str) -> InstanceLoad | None:
        return self.loads.get(instance_id)

    def is_empty(self, instance_id: str) -> bool:
        return instance_id not in self.busy

    def last_of_its_kind(self, instance_id: str) -> str | None:
        return self.needed

    def snapshot(self) -> dict[str, Any]:
        return {"instances": [{"id": name} for name in self.instances.infos]}


class World:
    """Two decode instances at the start, and room for two more."""

    def __init__(self) -> None:
        self.router = FakeRouter()
        self.stopped: list[str] = []
        self.fails: Exception | None = None
        self.fleet = InstancePool(
            self.router,  # type: ignore[arg-type]
            self.start,
            self.stop,
            max_instances=4,
            instances={"prefill": 0, "decode": 2, "neutral": 0},
            policy="llumnix",
        )
        for name in ("decode-0", "decode-1"):
            self.router.join(SimpleNamespace(instance_id=name))
            self.router.report(name)

    async def start(self, name: str, role: str) -> Any:
        await asyncio.sleep(START_S)
        if self.fails is not None:
            raise self.fails
        return SimpleNamespace(instance_id=name)

    async def stop(self, name: str) -> None:
        self.stopped.append(name)

    def want_one(self, times: int = 1) -> None:
        for _ in range(times):
            self.fleet.on_scaling(StartInstance("decode", "it is too full"))

    def want_stopped(self, name: str) -> None:
        self.fleet.on_scaling(StopInstance(name, "drained and empty"))

    @property
    def names(self) -> list[str]:
        return list(self.router.instances.infos)

    @property
    def decisions(self) -> list[str]:
        return [decision["what"] for decision in self.fleet.state()["decisions"]]


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    world = World()
    try:
        yield world
    finally:
        await world.fleet.close()


class TestStarting:
    @in_virtual_time
    async def test_counts_as_coming_until_it_reports(self) -> None:
        async with a_world() as world:
            world.want_one()
            assert world.router.instances.greetings == [{"decode": 1}]
            (row,) = world.fleet.state()["coming"]
            assert (row["id"], row["role"], row["state"]) == ("decode-2", "decode", "starting")
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-1", "decode-2"]
            assert Counter(world.router.instances.starting) == {"decode": 1}
            assert not world.fleet.state()["coming"]
            world.router.report("decode-2")
            await asyncio.sleep(1)
            assert not world.router.instances.starting
            assert world.router.instances.greetings[-1] == {}
            assert world.decisions == ["decode-2 is started: it is too full"]

    @in_virtual_time
    async def test_never_more_than_there_may_be(self) -> None:
        async with a_world() as world:
            world.want_one(times=5)
            await asyncio.sleep(START_S + 1)
            assert world.names == [f"decode-{number}" for number in range(4)]
            world.want_one()
            assert len(world.decisions) == 2

    @in_virtual_time
    async def test_an_id_is_used_once(self) -> None:
        async with a_world() as world:
            world.router.leave("decode-1")
            world.want_one()
            await asyncio.sleep(START_S + 1)
            assert world.names == ["decode-0", "decode-2"]

    @pytest.mark.parametrize("error", [EngineDeadError("no memory is left"), TimeoutError()])
    def test_a_start_that_fails_is_a_line(self, error: Exception) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world() as world:
                world.fails = error
                world.want_one()
                await asyncio.sleep(START_S + 1)
                assert world.names == ["decode-0", "decode-1"]
                assert world.decisions[0].startswith("decode-2 has not started: ")
                assert str(error) in world.decisions[0]
                assert world.router.instances.greetings[-1] == {}

        test()

    @in_virtual_time
    async def test_after_a_failure_the_next_ones_wait_longer_and_longer(self) -> None:
        async with a_world() as world:
            world.fails = EngineDeadError("no GPU is free")
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < began + 20 * MAX_RETRY_S:
                world.want_one()
                await asyncio.sleep(1)
            tries = int(world.decisions[0].split()[0].removeprefix("decode-")) - 1
            assert 30 < tries < 50, "two at a time"

    @in_virtual_time
    async def test_may_be_tried_again_soon_after_a_single_failure(self) -> None:
        async with a_world() as world:
            world.fails = EngineDeadError("a passing thing")
            world.want_one()
            await asyncio.sleep(START_S + RETRY_S + 0.1)
            world.fails = None
            world.want_one()
            await asyncio.sleep(START_S + 1)
            assert len(world.names) == 3


class TestStopping:
    @in_virtual_time
    async def test_an_empty_one(self) -> None:
        async with a_world() as world:
            world.router.report("decode-1", draining=True)
            world.want_stopped("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(1)
            assert (world.names, world.stopped) == (["decode-0"], ["decode-1"])
            assert world.decisions == ["decode-1 is stopped: drained and empty"]

    @in_virtual_time
    async def test_waits_for_what_was_on_its_way_there(self) -> None:
        async with a_world() as world:
            world.router.report("decode-1", draining=True)
            world.router.busy.add("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(EMPTY_S / 2)
            assert not world.stopped
            world.router.busy.clear()
            await asyncio.sleep(1)
            assert world.stopped == ["decode-1"]

    @in_virtual_time
    async def test_but_not_for_ever(self) -> None:
        async with a_world() as world:
            world.router.report("decode-1", draining=True)
            world.router.busy.add("decode-1")
            world.want_stopped("decode-1")
            await asyncio.sleep(EMPTY_S + 1)
            assert world.stopped == ["decode-1"]

    @pytest.mark.parametrize(
        "change",
        [lambda router: router.report("decode-1"), lambda router: router.leave("decode-1")],
        ids=["it is needed again", "it has died"],
    )
    def test_is_given_up(self, change: Callable[[FakeRouter], None]) -> None:
        @in_virtual_time
        async def test() -> None:
            async with a_world() as world:
                world.router.report("decode-1", draining=True)
                world.router.busy.add("decode-1")
                world.want_stopped("decode-1")
                await asyncio.sleep(1)
                change(world.router)
                await asyncio.sleep(2 * EMPTY_S)
                assert not world.stopped

        test()

    @in_virtual_time
    async def test_what_is_not_there_is_ignored(self) -> None:
        async with a_world() as world:
            world.want_stopped("decode-7")
            await asyncio.sleep(1)
            assert not world.stopped


class TestByHand:
    @in_virtual_time
    async def test_drained_and_left_running(self) -> None:
        """The scheduler finds it empty after a while; it is kept all the same."""
        async with a_world() as world:
            world.fleet.drain("decode-1")
            assert world.router.instances.sent == [("decode-1", SetDraining(True, by_hand=True))]
            world.router.report("decode-1", draining=True)
            world.want_stopped("decode-1")
            world.fleet.on_decided(SchedulerReport(["decode-1 is used again: more would be better"]))
            await asyncio.sleep(2 * EMPTY_S)
            assert not world.stopped
            assert world.decisions == ["decode-1 is drained: asked for by hand"]
            world.fleet.drain("decode-1", draining=False)
            assert world.router.instances.sent[-1] == ("decode-1", SetDraining(False, by_hand=True))

    @in_virtual_time
    async def test_drained_and_stopped_as_soon_as_it_is_empty(self) -> None:
        async with a_world() as world:
            world.router.busy.add("decode-1")
            world.fleet.drain("decode-1", stop=True)
            await asyncio.sleep(1)  # a report from before that says nothing of it
            world.router.report("decode-1", draining=True)
            await asyncio.sleep(100 * EMPTY_S)
            assert not world.stopped
            world.router.busy.clear()
            await asyncio.sleep(1)
            assert world.stopped == ["decode-1"]
            assert world.decisions[0] == "decode-1 is stopped: drained by hand"

    @in_virtual_time
    async def test_taken_back(self) -> None:
        async with a_world() as world:
            world.router.busy.add("decode-1")
            world.fleet.drain("decode-1", stop=True)
            world.router.report("decode-1", draining=True)
            await asyncio.sleep(1)
            world.fleet.drain("decode-1", draining=False)
            world.router.busy.clear()
            await asyncio.sleep(1)
            assert not world.stopped

    @in_virtual_time
    async def test_what_is_refused(self) -> None:
        async with a_world() as world:
            with pytest.raises(UnknownTargetError):
                world.fleet.drain("decode-7")
            world.router.needed = "decode-1 is the last decode instance"
            with pytest.raises(MigrationRefusedError, match="the last decode instance"):
                world.fleet.drain("decode-1")
            assert not world.router.instances.sent


class TestTheScheduler:
    @in_virtual_time
    async def test_is_alive_as_long_as_it_speaks(self) -> None:
        async with a_world() as world:

            def state() -> str:
                return str(world.fleet.state()["scheduler"]["state"])

            assert state() == "absent"
            world.fleet.scheduler_started("tcp://s", 7)
            assert world.router.instances.scheduler == "tcp://s"
            world.fleet.on_decided(SchedulerReport([]))
            assert state() == "alive"
            await asyncio.sleep(SCHEDULER_LEASE_S)
            assert state() == "absent"
            world.fleet.on_decided(SchedulerReport(["d0 is drained: x"]))
            assert (state(), world.decisions) == ("alive", ["d0 is drained: x"])
            world.fleet.scheduler_lost()
            assert state() == "absent"
            world.fleet.scheduler_started("tcp://next", 8)
            scheduler = world.fleet.state()["scheduler"]
            assert (scheduler["pid"], scheduler["restarts"]) == (8, 1)
            assert world.router.instances.scheduler == "tcp://next"
