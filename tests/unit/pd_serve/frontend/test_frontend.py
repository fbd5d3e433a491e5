"""The frontend: snapshots of the cluster, calls of the manager, integrity."""

import asyncio
from typing import Any

import pytest

from pd_serve.comm.cluster_state import (
    ClusterState,
    PastDecision,
    RestartState,
    SchedulerState,
    StartingInstance,
)
from pd_serve.comm.membership import MANAGER, InstanceInfo
from pd_serve.comm.requests import (
    Call,
    CheckIntegrity,
    DrainInstance,
    FindRequests,
    ListRequests,
    RestartInstances,
    ScalePools,
)
from pd_serve.errors import EngineDeadError, InvalidRequestError, MigrationRefusedError, UnknownTargetError
from pd_serve.observe.recorder import Observer
from tests.unit.pd_serve.frontend.frontend_world import World, turns

STATE = ClusterState(
    starting=[StartingInstance("d9", "decode", "waiting for resources: 1 GPU")],
    scheduler=SchedulerState("alive", "llumnix", 7, 2),
    scaled=[],
    decisions=[PastDecision(1.0, "d1 is drained: too large")],
    restart=RestartState(True, "1 of 3 done"),
    problems=["manager: handling Join from api failed: KeyError: 'x' (1 times)"],
)


async def test_a_snapshot_shows_members_starting_instances_and_the_manager_s_state(world: World) -> None:
    world.wire.hear(MANAGER, STATE)

    snapshot = world.frontend.snapshot()

    assert [row.id for row in snapshot.instances] == ["p0", "p1", "d0", "d1", "d9"]
    assert snapshot.instances[-1].state == "waiting for resources: 1 GPU"
    assert snapshot.scheduler is not None
    assert (snapshot.manager, snapshot.scheduler.state) == ("alive", "alive")
    assert snapshot.decisions == [PastDecision(1.0, "d1 is drained: too large")]
    assert [(row.id, row.requests) for row in snapshot.api_servers] == [("api", 0)]


async def test_without_a_manager_the_last_members_are_shown_and_the_manager_as_absent(world: World) -> None:
    world.wire.hear(MANAGER, STATE)
    world.frontend._members.received_at -= 60

    snapshot = world.frontend.snapshot()

    assert snapshot.scheduler is not None
    assert (snapshot.manager, snapshot.scheduler.state) == ("absent", "absent")
    assert snapshot.restart is not None
    assert not snapshot.restart.running
    assert world.frontend.num_live == 2
    with pytest.raises(EngineDeadError, match="the manager is absent"):
        await world.frontend.drain("d0")


async def test_a_slot_is_free_again_after_its_instance_has_left(world: World) -> None:
    assert world.frontend.instances.slots_by_instance() == {"p0": 0, "p1": 1, "d0": 2, "d1": 3}
    world.leave("p1")
    world.join("d2")
    assert world.frontend.instances.slot_of("d2") == 1


async def test_observers_hear_of_instances_that_join_and_leave(world: World) -> None:
    class Heard(Observer):
        def instance_joined(self, info: InstanceInfo) -> None:
            heard.append(f"{info.instance_id} joined")

        def instance_left(self, instance_id: str) -> None:
            heard.append(f"{instance_id} left")

    heard: list[str] = []
    world.frontend._recorder._observers = (Heard(),)

    world.leave("p1")
    world.join("d2")

    assert heard == ["p1 left", "d2 joined"]


@pytest.mark.parametrize(
    ("ask", "request_"),
    [
        (lambda f: f.drain("d0", stop=True), DrainInstance("d0", True, True)),
        (lambda f: f.scale({"decode": 3}), ScalePools({"decode": 3})),
        (lambda f: f.restart(), RestartInstances()),
        (lambda f: f.restart(cancel=True), RestartInstances(cancel=True)),
    ],
)
async def test_operations_are_calls_of_the_manager(world: World, ask: Any, request_: Any) -> None:
    task = asyncio.create_task(ask(world.frontend))
    await turns()
    [(peer, call)] = world.sent(Call)
    assert (peer, call.request) == (MANAGER, request_)
    world.answer(call)
    await task


@pytest.mark.parametrize("kind", [UnknownTargetError, MigrationRefusedError, InvalidRequestError])
async def test_a_refusal_of_the_manager_keeps_its_class(world: World, kind: type[Exception]) -> None:
    task = asyncio.create_task(world.frontend.restart())
    await turns()
    [(_, call)] = world.sent(Call)
    world.answer(call, error="it cannot be", error_class=kind.__name__)
    with pytest.raises(kind, match="it cannot be") as refused:
        await task
    assert type(refused.value) is kind


async def test_a_request_of_another_api_server_is_found_through_the_manager(world: World) -> None:
    world.submit()
    assert [found["id"] for found in await world.frontend.find_requests("r")] == ["r"]

    task = asyncio.create_task(world.frontend.find_requests("x"))
    await turns()
    [(peer, call)] = world.sent(Call)
    assert (peer, call.request) == (MANAGER, FindRequests("x"))
    world.answer(call, [{"id": "x"}])
    assert await task == [{"id": "x"}]


async def test_a_leaving_instance_is_reported_unused_once_no_request_is_on_it(world: World) -> None:
    world.submit()
    world.report("p0", draining=True, running=0)
    assert not world.requests.is_unused("p0")
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 1, 11)
    assert world.requests.is_unused("p0")
    assert not world.requests.is_unused("d1"), "it takes new requests"


async def test_integrity_collects_the_problems_of_all_processes(world: World) -> None:
    world.wire.hear(MANAGER, STATE)
    world.wire.failures.record("handling LoadReport from d0", KeyError("y"))
    checking = asyncio.create_task(world.frontend._integrity.problems())
    answered: set[str] = set()
    for _ in range(3):
        await turns()
        for peer, call in world.sent(Call):
            if call.call_id in answered:
                continue
            answered.add(call.call_id)
            if isinstance(call.request, CheckIntegrity):
                world.answer(call, ["d0: a block is lost"] if peer == "d0" else [])
            elif isinstance(call.request, ListRequests):
                world.answer(call, ["gone"] if peer == "d1" else [])

    problems = await checking

    assert any("handling LoadReport from d0 failed" in problem for problem in problems)
    assert any("handling Join from api failed" in problem for problem in problems)
    assert "d0: a block is lost" in problems
    assert "d1: holds requests that no client waits for: ['gone']" in problems


async def test_reports_of_unknown_instances_are_ignored(empty: World) -> None:
    empty.report("p0")
    assert empty.frontend.num_live == 0
    empty.join("p0")
    assert [info.instance_id for info in await empty.frontend.wait_for_instances()] == ["p0"]
    assert empty.frontend.num_live == 1
    empty.leave("p0")
    empty.report("p0")
    assert empty.frontend.num_live == 0
