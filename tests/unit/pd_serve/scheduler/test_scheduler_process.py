"""The scheduler's process, between a wire that keeps what is sent and a test that plays everybody else."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from pd_serve.comm.messages import (
    Hello,
    LoadReport,
    MoveOut,
    PeerLost,
    SchedulerReport,
    SetDraining,
    StartInstance,
    StopInstance,
    Subscribe,
)
from pd_serve.scheduler.scheduler_process import FIRST_LOOK_S, HEARTBEAT_S, SERVER_LEASE_S, SchedulerProcess
from router.load import InstanceLoad
from router.policies import policy_set
from router.scaling import PoolBounds
from tests.unit.pd_serve.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time

M = TypeVar("M")

FULL = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=5, running=10, block_tokens=32)
IDLE = InstanceLoad("d1", "decode", total_blocks=100, free_blocks=100, block_tokens=32)


class World:
    def __init__(self, autoscale: Mapping[str, PoolBounds] | None = None, **settings: float) -> None:
        self.wire = RecordingWire("scheduler")
        self.failures: list[BaseException] = []
        policies = policy_set("llumnix", **settings)
        self.process = SchedulerProcess(
            "scheduler", self.wire, policies, autoscale=autoscale, on_failure=self.failures.append
        )

    def hear(self, sender: str, message: object) -> None:
        self.wire.receive(sender, message)

    def hello(self, *peers: str, server: str = "api", starting: dict[str, int] | None = None) -> None:
        addresses = {peer: f"tcp://{peer}" for peer in peers}
        self.hear(server, Hello(f"tcp://{server}", f"tcp://{server}/tokens", addresses, starting or {}))

    def report(self, *loads: InstanceLoad) -> None:
        for load in loads:
            self.hear(load.instance_id, LoadReport(load, []))

    async def keep(self, seconds: float, *loads: InstanceLoad) -> None:
        """Time passes, in which the API server and the instances say what they say all the time."""
        for _ in range(round(seconds / 0.5)):
            self.hello(*(load.instance_id for load in loads))
            self.report(*loads)
            await asyncio.sleep(0.5)

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        return [m for peer, m, _ in self.wire.sent if isinstance(m, kind) and to in (None, peer)]


@asynccontextmanager
async def a_world(
    autoscale: Mapping[str, PoolBounds] | None = None, **settings: float
) -> AsyncIterator[World]:
    world = World(autoscale, **settings)
    try:
        yield world
    finally:
        await world.process.close()
    assert world.failures == []


class TestMembership:
    @in_virtual_time
    async def test_comes_with_a_greeting(self) -> None:
        async with a_world() as world:
            world.hello("d0", "d1")
            assert dict(world.process.members) == {"d0": "tcp://d0", "d1": "tcp://d1"}
            assert world.sent(Subscribe) == [Subscribe("scheduler/0")] * 2
            world.hello("d1", "d2")
            assert set(world.process.members) == set(world.wire.peers) - {"api"} == {"d1", "d2"}
            assert len(world.sent(Subscribe, "d1")) == 1

    @in_virtual_time
    async def test_is_what_any_api_server_knows(self) -> None:
        async with a_world() as world:
            world.hello("d0", "d1")
            world.hello("d1", "d2", server="other")
            assert set(world.process.members) == {"d0", "d1", "d2"}
            world.hear("api", PeerLost("d1"))
            assert set(world.process.members) == {"d0", "d2"}

    @in_virtual_time
    async def test_ends_with_the_last_api_server(self) -> None:
        async with a_world() as world:
            world.hello("d0")
            await asyncio.sleep(SERVER_LEASE_S + 2 * HEARTBEAT_S)
            assert not world.process.members
            assert not world.wire.peers

    @in_virtual_time
    async def test_is_said_again_so_that_nobody_forgets(self) -> None:
        async with a_world() as world:
            world.hello("d0")
            await asyncio.sleep(3.5 * HEARTBEAT_S)
            assert len(world.sent(Subscribe, "d0")) == 4
            assert [report.decided for report in world.sent(SchedulerReport, "api")] == [[]] * 4

    @in_virtual_time
    async def test_decides_whose_reports_count(self) -> None:
        async with a_world() as world:
            world.hello("d0")
            await world.keep(1.0, FULL)
            world.report(IDLE)
            await asyncio.sleep(1.0)
            assert not world.sent(MoveOut)


class TestCommands:
    @in_virtual_time
    async def test_the_full_one_gives_to_the_idle_one(self) -> None:
        async with a_world() as world:
            world.hello("d0", "d1")
            world.report(FULL, IDLE)
            await asyncio.sleep(0.1)
            assert {move.destination.instance_id for move in world.sent(MoveOut, "d0")} == {"d1"}
            assert not world.sent(MoveOut, "d1")

    @in_virtual_time
    async def test_who_is_gone_gets_nothing(self) -> None:
        async with a_world() as world:
            world.hello("d0", "d1")
            world.report(FULL)
            world.hello("d0")
            world.report(FULL, IDLE)
            await asyncio.sleep(0.5)
            assert not world.sent(MoveOut)

    @in_virtual_time
    async def test_the_next_one_knows_as_much_after_one_round(self) -> None:
        for _ in range(2):
            async with a_world() as world:
                world.hello("d0", "d1")
                world.report(FULL, IDLE)
                await asyncio.sleep(0.1)
                assert world.sent(MoveOut, "d0")

    @in_virtual_time
    async def test_drains_are_told_with_the_reason(self) -> None:
        async with a_world({"decode": PoolBounds(1, 2)}, drain_after_s=1.0, scale_interval_s=1.0) as world:
            await world.keep(4.0, IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
            assert SetDraining(True) in world.sent(SetDraining, "d0")
            line = next(report.decided[0] for report in world.sent(SchedulerReport, "api") if report.decided)
            assert line.startswith("d0 is drained: average freeness without it")
            drained = msgspec.structs.replace(IDLE, instance_id="d0", draining=True)
            await world.keep(3.0, IDLE, drained)
            assert world.sent(StopInstance, "api") == [StopInstance("d0", "drained and empty")]


class TestStarts:
    BOUNDS: Mapping[str, PoolBounds] = {"decode": PoolBounds(2, 3)}

    @in_virtual_time
    async def test_are_asked_for_once(self) -> None:
        """One API server does it, and it counts from the moment that it was asked."""
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            world.hello("d1")
            world.hello("d1", server="other")
            for _ in range(10):
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert [peer for peer, m, _ in world.wire.sent if isinstance(m, StartInstance)] == ["api"]
            assert world.process.starting["decode"] == 1
            for _ in range(10):
                world.hello("d1", starting={"decode": 1})
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert world.process.starting["decode"] == 1
            assert len(world.sent(StartInstance)) == 1
            world.hello("d1")  # it has not come
            for _ in range(10):
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert len(world.sent(StartInstance)) == 2

    @in_virtual_time
    async def test_wait_until_everybody_was_heard(self) -> None:
        """After a restart the first reports come one by one; a pool is not too small because of that."""
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            world.hello("d0", "d1")
            for _ in range(4):
                world.report(IDLE)
                await asyncio.sleep(FIRST_LOOK_S / 5)
            for _ in range(10):
                world.report(IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
                await asyncio.sleep(0.3)
            assert not world.sent(StartInstance)

    @in_virtual_time
    async def test_do_not_wait_for_ever(self) -> None:
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            world.hello("d0", "d1")
            for _ in range(10):
                world.report(IDLE)
                await asyncio.sleep(FIRST_LOOK_S / 5)
            assert len(world.sent(StartInstance)) == 1
