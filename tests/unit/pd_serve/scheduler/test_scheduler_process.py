"""The scheduler's process on a recording wire; the test sends the messages of all other processes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from pd_serve.comm.membership import MANAGER
from pd_serve.comm.messages import (
    Heartbeat,
    LoadReport,
    MoveOut,
    SchedulerReport,
    SetDraining,
    StartInstance,
    StopInstance,
)
from pd_serve.comm.timing import FIRST_REPORTS_S, HEARTBEAT_S, ORPHAN_S
from pd_serve.errors import EngineDeadError
from pd_serve.scheduler.scheduler_process import SchedulerProcess
from router.load import InstanceLoad
from router.policies import policy_set
from router.request import Demand
from router.scaling import PoolBounds
from tests.members import membership
from tests.recording_wire import RecordingWire
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
            self.wire, policies, autoscale=autoscale, on_failure=self.failures.append
        )

    def members(self, *instances: str, starting: dict[str, int] | None = None, term: int = 1) -> None:
        """The manager sends the membership."""
        message = membership(*instances, api_servers=["api", "other"], starting=starting, term=term)
        self.wire.hear(MANAGER, message)

    def report(self, *loads: InstanceLoad) -> None:
        for load in loads:
            self.wire.hear(load.instance_id, LoadReport(load, []))

    async def keep(self, seconds: float, *loads: InstanceLoad) -> None:
        """Time passes, in which the manager and the instances send their heartbeats."""
        for _ in range(round(seconds / 0.5)):
            self.members(*(load.instance_id for load in loads))
            self.report(*loads)
            await asyncio.sleep(0.5)

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        return self.wire.sent_to(kind, to)


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
    async def test_membership_connects_the_scheduler_to_instances_and_manager(self) -> None:
        async with a_world() as world:
            world.members("d0", "d1")
            assert {"manager", "d0", "d1"} <= set(world.wire.peers)
            world.members("d1", "d2")
            assert "d0" not in world.wire.peers

    @in_virtual_time
    async def test_membership_of_an_earlier_manager_is_ignored(self) -> None:
        async with a_world() as world:
            world.members("d0", "d1", term=2)
            world.members(term=1)
            assert {"d0", "d1"} <= set(world.wire.peers)

    @in_virtual_time
    async def test_the_scheduler_sends_heartbeats_to_the_manager(self) -> None:
        async with a_world() as world:
            world.members("d0")
            await asyncio.sleep(3.5 * HEARTBEAT_S)
            reports = world.sent(SchedulerReport, MANAGER)
            assert [report.decisions for report in reports] == [[]] * 4
            assert [report.stats is not None for report in reports] == [False, True, True, True]

    @in_virtual_time
    async def test_reports_of_instances_outside_the_membership_are_ignored(self) -> None:
        async with a_world() as world:
            world.members("d0")
            await world.keep(1.0, FULL)
            world.report(IDLE)
            await asyncio.sleep(1.0)
            assert not world.sent(MoveOut)

    @in_virtual_time
    async def test_a_scheduler_without_manager_and_api_servers_ends_itself(self) -> None:
        async with a_world() as world:
            world.members("d0")
            for _ in range(5):
                await asyncio.sleep(ORPHAN_S / 2)
                world.wire.hear("api", Heartbeat())
            assert world.failures == []
            await asyncio.sleep(ORPHAN_S + 2 * HEARTBEAT_S)
            assert [type(error) for error in world.failures] == [EngineDeadError]
            world.failures.clear()

    @in_virtual_time
    async def test_waiting_requests_of_all_api_servers_are_added_up(self) -> None:
        async with a_world() as world:
            world.members("d0")
            world.wire.hear("api", Heartbeat(Demand(2, 100)))
            world.wire.hear("other", Heartbeat(Demand(1, 10)))
            world.wire.hear("unknown", Heartbeat(Demand(9, 9)))
            assert world.process.waiting == Demand(3, 110)
            world.wire.hear(MANAGER, membership("d0", api_servers=["api"]))
            assert world.process.waiting == Demand(2, 100)


class TestCommands:
    @in_virtual_time
    async def test_a_full_instance_is_ordered_to_move_a_request_to_an_idle_one(self) -> None:
        async with a_world() as world:
            world.members("d0", "d1")
            world.report(FULL, IDLE)
            await asyncio.sleep(0.1)
            assert {move.destination.instance_id for move in world.sent(MoveOut, "d0")} == {"d1"}
            assert not world.sent(MoveOut, "d1")

    @in_virtual_time
    async def test_an_instance_that_has_left_is_no_destination(self) -> None:
        async with a_world() as world:
            world.members("d0", "d1")
            world.report(FULL)
            world.members("d0")
            world.report(FULL, IDLE)
            await asyncio.sleep(0.5)
            assert not world.sent(MoveOut)

    @in_virtual_time
    async def test_a_new_scheduler_decides_the_same_after_one_round_of_reports(self) -> None:
        for _ in range(2):
            async with a_world() as world:
                world.members("d0", "d1")
                world.report(FULL, IDLE)
                await asyncio.sleep(0.1)
                assert world.sent(MoveOut, "d0")

    @in_virtual_time
    async def test_drains_are_reported_to_the_manager_with_the_reason(self) -> None:
        async with a_world({"decode": PoolBounds(1, 2)}, drain_after_s=1.0, scale_interval_s=1.0) as world:
            await world.keep(4.0, IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
            assert SetDraining(True) in world.sent(SetDraining, "d0")
            reports = world.sent(SchedulerReport, MANAGER)
            decision = next(report.decisions[0] for report in reports if report.decisions)
            assert (decision.instance_id, decision.action) == ("d0", "is drained")
            assert decision.reason.startswith("average freeness without it")
            drained = msgspec.structs.replace(IDLE, instance_id="d0", draining=True)
            await world.keep(3.0, IDLE, drained)
            assert world.sent(StopInstance, MANAGER) == [StopInstance("d0", "drained and empty")]


class TestStarts:
    BOUNDS: Mapping[str, PoolBounds] = {"decode": PoolBounds(2, 3)}

    @in_virtual_time
    async def test_an_instance_is_requested_once(self) -> None:
        """An instance counts from the moment that it was asked for."""
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            world.members("d1")
            for _ in range(10):
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert len(world.sent(StartInstance, MANAGER)) == 1
            assert world.process.starting["decode"] == 1
            for _ in range(10):
                world.members("d1", starting={"decode": 1})
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert world.process.starting["decode"] == 1
            assert len(world.sent(StartInstance)) == 1
            world.members("d1")  # its start has failed
            for _ in range(10):
                world.report(IDLE)
                await asyncio.sleep(0.3)
            assert len(world.sent(StartInstance)) == 2

    @in_virtual_time
    async def test_decisions_wait_for_the_first_report_of_every_instance(self) -> None:
        """After a restart the first reports come one by one; a pool is not too small because of that."""
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            world.members("d0", "d1")
            for _ in range(4):
                world.report(IDLE)
                await asyncio.sleep(FIRST_REPORTS_S / 5)
            for _ in range(10):
                world.report(IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
                await asyncio.sleep(0.3)
            assert not world.sent(StartInstance)

    @in_virtual_time
    async def test_decisions_wait_for_first_reports_at_most_the_bound(self) -> None:
        async with a_world() as world:
            world.members("d0", "d1", "d2")
            for _ in range(10):
                world.report(FULL, IDLE)
                await asyncio.sleep(FIRST_REPORTS_S / 5)
            assert world.sent(MoveOut, "d0")

    @in_virtual_time
    async def test_nothing_is_started_in_the_place_of_an_instance_that_is_silent(self) -> None:
        """It, or this process, was suspended. The manager decides whether it is replaced."""
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            await world.keep(5.0, IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
            for _ in range(20):
                world.members("d0", "d1")
                await asyncio.sleep(1.0)
            assert not world.sent(StartInstance)

    @in_virtual_time
    async def test_a_pool_that_has_lost_all_instances_gets_its_lower_bound(self) -> None:
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            await world.keep(5.0, IDLE, msgspec.structs.replace(IDLE, instance_id="d0"))
            world.members()
            await asyncio.sleep(3.0)
            assert len(world.sent(StartInstance, MANAGER)) == 2
            for _ in range(20):
                world.members(starting={"decode": 2})
                await asyncio.sleep(1.0)
            assert len(world.sent(StartInstance)) == 2

    @in_virtual_time
    async def test_without_the_membership_nothing_is_started(self) -> None:
        async with a_world(self.BOUNDS, scale_interval_s=0.1) as world:
            await asyncio.sleep(30.0)
            assert not world.wire.sent
