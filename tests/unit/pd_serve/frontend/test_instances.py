"""The instances of an API server: slots, loads and calls."""

import asyncio
from typing import Any

import pytest

from pd_serve.comm.membership import MembershipView
from pd_serve.comm.messages import ToApiServer
from pd_serve.comm.requests import Call, CheckIntegrity
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import POLL_S
from pd_serve.errors import EngineDeadError, InvalidRequestError, PdServeError, UnknownTargetError
from pd_serve.frontend.instances import Instances
from router.load import InstanceLoad
from router.projected_loads import ProjectedLoads
from tests.members import membership
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time


class World:
    """An API server's instances. A test joins them, reports their loads, and answers their calls."""

    def __init__(self, *names: str) -> None:
        self.wire = RecordingWire("api")
        members = MembershipView("api", self.wire)
        self.instances = Instances(self.wire, members, ProjectedLoads(), num_slots=3)
        self.wire.listen(ToApiServer, lambda peer, answer, _: self.instances.calls.on_answer(peer, answer))
        members.update(membership(*names))
        for info in self.instances:
            self.instances.add(info)
        self.members = members

    def report(self, name: str) -> None:
        self.instances.loads.report(InstanceLoad(name, "decode", total_blocks=100, free_blocks=7))

    async def answer(self, results: dict[str, Any]) -> None:
        """Every instance answers its last call with its result, or with its error."""
        await asyncio.sleep(POLL_S)
        for name, result in results.items():
            call_id = self.wire.sent_to(Call, name)[-1].call_id
            failed = isinstance(result, PdServeError)
            self.wire.hear(name, Answer.of(call_id, result) if failed else Answer(call_id, result))


@in_virtual_time
async def test_a_new_instance_gets_the_lowest_free_slot() -> None:
    instances = World("p0", "p1", "d0").instances
    assert instances.slots_by_instance() == {"p0": 0, "p1": 1, "d0": 2}

    [_, p1, _] = list(instances)
    instances.remove("p1")
    assert instances.slots_by_instance() == {"p0": 0, "d0": 2}
    instances.add(p1)

    assert instances.slot_of("p1") == 1


@in_virtual_time
async def test_more_instances_than_slots_share_the_first_slot() -> None:
    """While an instance is replaced there may be one more than the metrics have slots for."""
    assert World("p0", "p1", "d0", "d1").instances.slot_of("d1") == 0


@in_virtual_time
async def test_a_removed_instance_has_no_load_and_its_calls_fail() -> None:
    world = World("p0", "d0")
    world.report("d0")
    assert world.instances.load_of("d0") is not None
    call = asyncio.create_task(world.instances.call("d0", CheckIntegrity()))
    await asyncio.sleep(0)

    world.instances.remove("d0")

    assert world.instances.load_of("d0") is None
    with pytest.raises(EngineDeadError, match="d0 has died"):
        await call


@in_virtual_time
async def test_an_instance_that_was_never_added_can_be_removed() -> None:
    instances = World("p0").instances

    instances.remove("d0")

    assert instances.slots_by_instance() == {"p0": 0}


@in_virtual_time
async def test_a_call_to_an_unknown_instance_is_an_error_without_a_message() -> None:
    world = World("p0")

    with pytest.raises(UnknownTargetError, match="no instance 'd7'"):
        await world.instances.call("d7", CheckIntegrity())
    assert world.wire.sent == []


@in_virtual_time
async def test_calling_all_instances_returns_their_answers_by_instance() -> None:
    world = World("p0", "d0")
    calls = asyncio.create_task(world.instances.call_all(CheckIntegrity()))

    await world.answer({"d0": ["d0's"], "p0": ["p0's"]})

    assert await calls == {"p0": ["p0's"], "d0": ["d0's"]}


@pytest.mark.parametrize("error", [EngineDeadError("why"), InvalidRequestError("why")])
@in_virtual_time
async def test_calling_all_instances_fails_if_one_fails(error: PdServeError) -> None:
    world = World("p0", "d0")
    calls = asyncio.create_task(world.instances.call_all(CheckIntegrity()))

    await world.answer({"p0": [], "d0": error})

    with pytest.raises(EngineDeadError, match="why"):
        await calls


@in_virtual_time
async def test_an_instance_that_dies_meanwhile_is_left_out() -> None:
    world = World("p0", "d0")
    calls = asyncio.create_task(world.instances.call_all(CheckIntegrity()))

    await asyncio.sleep(0)
    world.members.update(membership("p0", term=2))
    world.instances.remove("d0")
    await world.answer({"p0": ["p0's"]})

    assert await calls == {"p0": ["p0's"]}


@in_virtual_time
async def test_waiting_for_reports_ends_once_every_instance_has_reported() -> None:
    world = World("p0", "d0")
    waiting = asyncio.create_task(world.instances.wait_for_reports())
    world.report("p0")
    await asyncio.sleep(10)
    assert not waiting.done()

    world.report("d0")

    await waiting


@in_virtual_time
async def test_waiting_for_reports_does_not_end_without_instances() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(100):
            await World().instances.wait_for_reports()
