"""Calls of API servers to the manager: operations, and requests of other API servers."""

import asyncio
from typing import Any

import pytest

from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.requests import (
    Call,
    DrainInstance,
    FindRequests,
    ManualMigration,
    MigrateByName,
    RestartInstances,
    ScalePools,
)
from pd_serve.comm.rpc import Answer
from pd_serve.errors import EngineDeadError, UnknownTargetError
from pd_serve.manager.launcher import ManagerNotes
from tests.unit.pd_serve.manager.manager_world import World, a_world
from tests.virtual_time import in_virtual_time

RECORD = MigrationRecord(
    request_id=RequestId("r"),
    source=InstanceId("decode-1"),
    destination=InstanceId("decode-0"),
    reason="manual",
    tokens=120,
)


@pytest.mark.parametrize(
    "operation", [DrainInstance("decode-1", True, True), ScalePools({"decode": 3}), RestartInstances()]
)
@in_virtual_time
async def test_an_operation_is_answered_when_the_instances_have_noted_it(operation: Any) -> None:
    async with a_world() as world:
        await asyncio.sleep(1)
        before, keep_notes, go_on = world.launcher.notes, world.launcher.keep_notes, asyncio.Event()

        async def keep_late(notes: ManagerNotes) -> int:
            await go_on.wait()
            return await keep_notes(notes)

        world.launcher.keep_notes = keep_late  # type: ignore[method-assign]
        answer = asyncio.create_task(world.call(operation))
        await asyncio.sleep(1)
        assert not answer.done()
        go_on.set()
        await answer
        assert world.launcher.notes != before


@in_virtual_time
async def test_a_superseded_manager_confirms_no_operation() -> None:
    async with a_world() as world:
        await asyncio.sleep(1)
        world.supersede()
        with pytest.raises(EngineDeadError, match="another manager has taken over"):
            await world.call(ScalePools({"decode": 3}))


@in_virtual_time
async def test_a_superseded_manager_carries_no_operation_out() -> None:
    """It stood still, and another manager uses the instance whose start it would give up."""
    async with a_world() as world:
        await asyncio.sleep(1)
        world.launcher.start_s["decode-2"] = 60.0
        await world.call(ScalePools({"decode": 3}))
        await asyncio.sleep(1)
        world.supersede()
        keep_notes = world.launcher.keep_notes

        async def keep_late(notes: ManagerNotes) -> int:
            await asyncio.sleep(0.1)
            return await keep_notes(notes)

        world.launcher.keep_notes = keep_late  # type: ignore[method-assign]
        with pytest.raises(EngineDeadError, match="another manager has taken over"):
            await world.call(ScalePools({"decode": 2}))
        await asyncio.sleep(5)
        assert world.launcher.stopped == []
        assert world.notices.warnings == ["another manager has taken over; this one ends"]


class TestRequestsOfOtherApiServers:
    """Each API server has its own requests; the manager asks the others."""

    async def ask(self, world: World, request: Any, answers: dict[str, Answer]) -> Any:
        """Calls as "api"; every other API server answers as given, with the id of its call."""
        asking = asyncio.create_task(world.call(request))
        answered: set[str] = set()
        while not asking.done():
            await asyncio.sleep(0.01)
            for name, answer in answers.items():
                for call in world.sent(Call, name):
                    if (name, call.call_id) not in answered:  # type: ignore[comparison-overlap]
                        answered.add((name, call.call_id))  # type: ignore[arg-type]
                        reply = Answer(call.call_id, answer.result, answer.error, answer.error_class)
                        world.wire.hear(name, reply)
        return await asking

    @in_virtual_time
    async def test_a_manual_migration_is_forwarded_to_the_api_server_of_the_request(self) -> None:
        async with a_world() as world:
            world.joined += ["b", "c"]
            await asyncio.sleep(1)
            unknown = Answer("", None, "no running request 'r'", "UnknownTargetError")
            cost = ManualMigration(RECORD, 0.0085)
            answers = {"b": unknown, "c": Answer("", cost)}
            assert await self.ask(world, MigrateByName("r", "decode-0"), answers) == cost
            with pytest.raises(UnknownTargetError, match="no running request 'r'"):
                await self.ask(world, MigrateByName("r", "decode-0"), {"b": unknown, "c": unknown})

    @in_virtual_time
    async def test_timelines_come_from_all_other_api_servers(self) -> None:
        async with a_world() as world:
            world.joined += ["b", "c"]
            await asyncio.sleep(1)
            answers = {"b": Answer("", [{"id": "r-0"}]), "c": Answer("", [{"id": "r-1"}])}
            found = await self.ask(world, FindRequests("r"), answers)
            assert found == [{"id": "r-0"}, {"id": "r-1"}]

    @in_virtual_time
    async def test_an_api_server_that_is_gone_holds_no_answer_up_longer_than_its_lease(self) -> None:
        async with a_world() as world:
            world.joined += ["b", "c"]
            await asyncio.sleep(1)
            world.joined.remove("b")
            answers = {"c": Answer("", [{"id": "r-1"}])}
            assert await self.ask(world, FindRequests("r"), answers) == [{"id": "r-1"}]
            world.joined.append("b")
            await asyncio.sleep(1)
            world.joined.remove("b")
            moved = ManualMigration(RECORD, 0.0085)
            answers = {"c": Answer("", moved)}
            assert await self.ask(world, MigrateByName("r", "decode-0"), answers) == moved
