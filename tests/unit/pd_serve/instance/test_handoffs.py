"""Hand-offs from a prefill instance to decode instances, and stranded requests."""

import asyncio

import pytest

from migration.bounds import MigrationBounds
from migration.errors import RefusalCode
from migration.messages import (
    Offer,
    Pull,
    Refused,
)
from pd_serve.comm.messages import (
    HandOff,
    MigrationEnded,
)
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S
from pd_serve.errors import DestinationRefusedError, SourceGoneError
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.unit.pd_serve.made_migrations import FULL
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_hand_off_begins_with_the_first_prefill_step() -> None:
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.settle()
        assert not world.sent(Offer)
        await world.start_prefill()
        assert [offer.reason for offer in world.sent(Offer, "d1")] == ["handoff"]
        await world.move("d1")
        assert world.engine.called("release") == [[R]]
        (ended,) = world.sent(MigrationEnded, "api")
        assert (ended.record.committed, ended.record.destination) == (True, "d1")
        assert not world.sent(Offer, "d0")
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_is_stranded_once_all_candidates_have_refused_it() -> None:
    """It is in the load reports until it has moved."""
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.start_prefill()
        await world.answer("d1", lambda migration_id: Refused(migration_id, FULL))
        assert not world.reports()[-1].stranded
        await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
        assert world.reports()[-1].stranded == ["r"]
        assert [ended.record.why for ended in world.sent(MigrationEnded)] == ["refused: full"] * 2
        world.hear("api", HandOff(R, "d0"))
        await world.settle()
        await world.move("d0")
        assert world.reports()[-1].stranded == []
        assert [ended.record.committed for ended in world.sent(MigrationEnded)] == [False, False, True]


@in_virtual_time
async def test_a_request_without_candidates_is_stranded_until_one_is_named() -> None:
    """The decode pool was empty when the request arrived."""
    async with World() as world:
        world.add(handoff=[])
        await world.start_prefill()
        assert not world.sent(Offer)
        assert world.reports()[-1].stranded == ["r"]
        world.hear("api", HandOff(R, "d1"))
        await world.settle()
        await world.move("d1")
        assert world.reports()[-1].stranded == []
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_without_a_hand_off_is_not_offered() -> None:
    async with World() as world:
        world.add(handoff=None)
        await world.start_prefill()
        assert [options["handoff"] for _, _, options in world.engine.called("add")] == [False]
        assert world.reports()[-1].stranded == []


@in_virtual_time
async def test_a_stranded_request_that_ends_is_forgotten() -> None:
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        await world.answer("d1", lambda migration_id: Refused(migration_id, FULL))
        assert await world.llumlet.check_integrity() == ["p0: requests wait for a hand-off: ['r']"]
        world.engine.end("r")
        await world.settle()
        await asyncio.sleep(INSTANCE_HEARTBEAT_S)
        assert world.reports()[-1].stranded == []
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_that_ends_while_it_is_described_is_not_stranded() -> None:
    """The answer that it runs and its end wait on the event loop; the end is handled first."""
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        world.engine.held["describe"] = asyncio.Event()
        await world.answer("d1", lambda migration_id: Refused(migration_id, FULL))
        world.llumlet.events.on_requests_ended([R])  # still described as running
        world.engine.held["describe"].set()
        await world.settle()
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_hand_off_beyond_the_limit_of_migrations_is_stranded() -> None:
    """It is in the load reports, so an API server names a destination later."""
    async with World(MigrationBounds(max_outgoing=1)) as world:
        for request_id in ("r", "s"):
            world.add(request_id, handoff=["d1"])
            await world.start_prefill(request_id)
        assert len(world.sent(Offer)) == 1
        assert world.reports()[-1].stranded == ["s"]


@pytest.mark.parametrize(
    "error",
    [
        DestinationRefusedError(RefusalCode.UNSUPPORTED_ENGINE, "migration is off here"),
        DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, "a request with an image cannot move"),
    ],
)
@in_virtual_time
async def test_a_request_that_cannot_move_stays_and_is_not_stranded(error: Exception) -> None:
    for candidates in (["d1"], []):
        async with World() as world:
            world.engine.always_fail["describe"] = error
            world.add(handoff=candidates)
            await world.start_prefill()
            assert not world.sent(Offer)
            assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_that_is_preempted_before_its_hand_off_is_stranded_and_moves_later() -> None:
    async with World() as world:
        world.engine.always_fail["describe"] = SourceGoneError(RefusalCode.NOT_RUNNING, "preempted")
        world.add(handoff=["d1"])
        await world.start_prefill()
        assert not world.sent(Offer)
        assert world.reports()[-1].stranded == ["r"]
        world.hear("api", HandOff(R, "d0"))
        await world.settle()
        assert world.reports()[-1].stranded == ["r"]  # not yet in the batch again
        world.engine.always_fail.clear()
        world.hear("api", HandOff(R, "d0"))
        await world.settle()
        await world.move("d0")
        assert world.reports()[-1].stranded == []
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_that_is_preempted_during_its_hand_off_is_stranded() -> None:
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.start_prefill()
        world.engine.fail["next_stage"] = SourceGoneError(RefusalCode.PREEMPTED, "preempted")
        world.engine.always_fail["describe"] = SourceGoneError(RefusalCode.NOT_RUNNING, "preempted")
        await world.answer("d1", lambda migration_id: Pull(migration_id, 0))
        assert world.reports()[-1].stranded == ["r"]
        world.engine.end("r")
        await world.settle()
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_stranded_request_that_turns_out_to_have_ended_is_forgotten() -> None:
    async with World() as world:
        world.add(handoff=[])
        await world.start_prefill()
        world.engine.running.discard("r")  # its end was not reported
        world.hear("api", HandOff(R, "d0"))
        await world.settle()
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_request_that_ends_before_its_prefill_is_not_handed_off() -> None:
    async with World() as world:
        world.add(handoff=["d1"])
        await world.settle()
        world.engine.end("r")
        await world.start_prefill()
        assert not world.sent(Offer)


@in_virtual_time
async def test_a_candidate_that_is_no_member_is_skipped() -> None:
    async with World() as world:
        world.add(handoff=["d7", "d1"])
        await world.start_prefill()
        assert not world.sent(Offer, "d7")
        assert len(world.sent(Offer, "d1")) == 1
