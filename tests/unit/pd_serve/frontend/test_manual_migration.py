"""Moving one request for an operator."""

import asyncio

import pytest

from migration.messages import InstanceId
from pd_serve.comm.messages import AddRequest
from pd_serve.comm.requests import Call, MigrateByName, MoveRequest
from pd_serve.errors import MigrationRefusedError, RefusalCode, UnknownTargetError
from pd_serve.frontend.manual_migration import MigrationMode
from router.request import NewRequest
from tests.unit.pd_serve.frontend.frontend_world import R, World, record, turns
from tests.virtual_time import in_virtual_time


async def test_migrate_returns_the_record_and_the_downtime(world: World) -> None:
    """It is over with the first token from the destination, which may come long after the commit."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call = await world.migrate("d1")
    assert world.moves() == [("p0", Call(call.call_id, MoveRequest(R, InstanceId("d1"))))]

    world.answer(call, record("r", "p0", "d1", stages=2, blocks=3, tokens=21))
    await turns()
    assert not task.done()
    world.clock.now += 0.25
    world.tokens("d1", 1, 1, 11)

    moved = await task
    assert (moved.downtime_ms, moved.record.stages, moved.record.blocks) == (250.0, 2, 3)
    assert moved.record.tokens == 21


async def test_the_migration_of_another_api_server_s_request_is_a_call_of_the_manager(world: World) -> None:
    task = asyncio.create_task(world.frontend.migrate("r", "d0"))
    await turns()
    [(peer, call)] = world.sent(Call)
    assert (peer, call.request) == ("manager", MigrateByName("r", "d0"))

    world.answer(call, error="no running request 'r'", error_class="UnknownTargetError")

    with pytest.raises(UnknownTargetError, match="no running request 'r'"):
        await task


async def test_migrate_to_an_unknown_instance_is_refused_at_once(world: World) -> None:
    world.submit()
    with pytest.raises(UnknownTargetError, match="no instance 'd9'"):
        await world.frontend.migrate("r", "d9")


async def test_a_refused_migration_raises_its_reason(world: World) -> None:
    world.submit()
    task, call = await world.migrate("d0")

    world.answer(call, record("r", "p0", "d0", False, "no free blocks"))

    with pytest.raises(MigrationRefusedError, match="no free blocks") as refused:
        await task
    assert refused.value.code is RefusalCode.NO_FREE_BLOCKS


async def test_migrate_follows_a_request_that_has_just_moved_on(world: World) -> None:
    """The hand-off was under way: the new owner is asked."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call = await world.migrate("d1")

    world.tokens("d0", 1, 1, 11)
    world.answer(call, record("r", "p0", "d1", False, "not here", RefusalCode.NOT_HERE))
    await turns()
    peer, again = world.moves()[-1]
    assert (peer, again.request) == ("d0", MoveRequest(R, InstanceId("d1")))
    world.answer(again, record("r", "d0", "d1", stages=1))
    world.tokens("d1", 2, 2, 12)

    assert (await task).record.stages == 1


async def test_a_migration_whose_source_dies_is_refused_and_the_request_goes_on(world: World) -> None:
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, _ = await world.migrate("d0")

    world.leave("p0")

    with pytest.raises(MigrationRefusedError, match="p0 has died; the request is recomputed elsewhere"):
        await task
    assert world.sent(AddRequest)[-1][0] == "p1"


@pytest.mark.parametrize("answered", [False, True])
@in_virtual_time
async def test_a_migration_that_is_not_seen_is_refused_after_a_bounded_time(answered: bool) -> None:
    """The call or its answer was lost; or the destination sends no token."""
    world = World()
    world.join("p0", "p1", "d0", "d1")
    world.submit()
    task, call = await world.migrate("d0")
    if answered:
        world.answer(call, record("r", "p0", "d0", stages=1))
    with pytest.raises(MigrationRefusedError, match="d0 has not continued r within 60 s") as refused:
        await task
    assert refused.value.code is RefusalCode.TIMED_OUT
    await world.frontend.close()


async def test_a_request_that_ends_right_after_the_commit_ends_the_wait(world: World) -> None:
    """The client goes away before the destination's first token."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call = await world.migrate("d0")
    world.answer(call, record("r", "p0", "d0", stages=1))
    await turns()

    world.requests.abort(["r"])

    assert (await task).record.stages == 1


@pytest.mark.parametrize("mode", ["live", "recompute"])
async def test_a_request_that_waits_for_an_instance_does_not_move(empty: World, mode: MigrationMode) -> None:
    """Neither in the waiting line, nor after the loss of its instance: it would be started twice."""
    empty.join("n0", "n1")
    for name in ("n0", "n1"):
        empty.report(name, free=1, running=1)
    empty.requests.submit("r", [b"payload"], NewRequest(64))

    with pytest.raises(MigrationRefusedError, match="r waits for an instance") as refused:
        await empty.frontend.migrate("r", "n1", mode)

    assert refused.value.code is RefusalCode.NOT_RUNNING
    assert empty.sent(AddRequest) == []
