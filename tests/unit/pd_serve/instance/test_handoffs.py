"""Hand-offs from a prefill instance to decode instances, and stranded requests."""

import asyncio

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
    SetRole,
)
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S
from pd_serve.errors import DestinationRefusedError, SourceGoneError
from tests.unit.pd_serve.instance.instance_world import R, World, described
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
async def test_a_request_is_offered_while_its_first_step_computes() -> None:
    """The engine answers between two steps only."""
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.settle()
        world.engine.held["describe"] = asyncio.Event()
        world.llumlet.events.on_prefill_started([described("r")])
        await world.settle()
        assert [offer.request for offer in world.sent(Offer)] == [described("r")]

        world.engine.running.add("r")
        await world.answer("d1", lambda migration_id: Refused(migration_id, FULL))
        assert len(world.sent(Offer)) == 1  # to the next one as it is by then
        world.engine.held["describe"].set()
        await world.settle()
        assert len(world.sent(Offer)) == 2


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
    """It ends with its prefill, so it never decodes."""
    async with World() as world:
        world.add(handoff=None)
        await world.settle()
        world.llumlet.events.on_prefill_started([described("r")])
        await world.step()
        assert [options["handoff"] for _, _, options in world.engine.called("add")] == [False]
        assert not world.sent(Offer)
        assert world.reports()[-1].stranded == []


@in_virtual_time
async def test_a_request_that_decodes_on_a_prefill_instance_is_stranded_however_it_came_there() -> None:
    """It was moved there by hand, or ran there when the instance became a prefill instance."""
    async with World() as world:
        world.hear("scheduler", SetRole("decode"))
        world.engine.running.add("r")
        await world.step()
        assert world.reports()[-1].stranded == []
        world.hear("scheduler", SetRole("prefill"))
        await world.step()
        assert world.reports()[-1].stranded == ["r"]
        world.hear("api", HandOff(R, "d1"))
        await world.settle()
        await world.move("d1")
        assert world.reports()[-1].stranded == []
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_stranded_requests_of_an_instance_that_becomes_a_decode_instance_stay_there() -> None:
    async with World() as world:
        world.engine.running.add("r")
        await world.step()
        assert world.reports()[-1].stranded == ["r"]
        world.hear("scheduler", SetRole("decode"))
        await world.step()
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
async def test_a_request_that_ends_during_the_look_for_stranded_ones_is_not_stranded() -> None:
    """The answer that it runs and its end wait on the event loop; the end is handled first."""
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        world.engine.held["running_requests"] = asyncio.Event()
        await world.answer("d1", lambda migration_id: Refused(migration_id, FULL))
        world.llumlet.events.on_requests_ended([R])  # still listed as running
        world.engine.held["running_requests"].set()
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


@in_virtual_time
async def test_a_request_that_was_preempted_during_its_hand_off_is_stranded_when_it_runs_again() -> None:
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.settle()
        world.llumlet.events.on_prefill_started([described("r")])
        await world.settle()
        world.engine.fail["next_stage"] = SourceGoneError(RefusalCode.PREEMPTED, "the request was preempted")
        await world.answer("d1", lambda migration_id: Pull(migration_id, 0))
        await world.step()
        assert len(world.sent(Offer)) == 1  # to the next one it is not offered: it does not run
        assert [ended.record.committed for ended in world.sent(MigrationEnded)] == [False]
        assert world.reports()[-1].stranded == []
        world.engine.running.add("r")
        await world.step()
        assert world.reports()[-1].stranded == ["r"]


@in_virtual_time
async def test_a_request_that_the_engine_does_not_give_away_stays_and_is_not_stranded() -> None:
    async with World() as world:
        world.add(handoff=[])
        await world.settle()
        world.llumlet.events.on_prefill_started([described("r")])
        text = "a request with an image cannot move"
        world.engine.fail["describe"] = DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, text)
        world.hear("api", HandOff(R, "d1"))
        await world.step()
        assert not world.sent(Offer)
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_hand_off_to_an_instance_that_is_gone_leaves_the_request_stranded() -> None:
    async with World() as world:
        world.add(handoff=[])
        await world.start_prefill()
        world.hear("api", HandOff(R, "d7"))
        await world.step()
        assert not world.sent(Offer)
        assert world.reports()[-1].stranded == ["r"]
        assert world.fatal == []


@in_virtual_time
async def test_a_request_that_is_preempted_during_its_copy_is_stranded_when_it_runs_again() -> None:
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.start_prefill()
        world.engine.fail["next_stage"] = SourceGoneError(RefusalCode.PREEMPTED, "preempted")
        world.engine.running.discard("r")
        await world.answer("d1", lambda migration_id: Pull(migration_id, 0))
        assert world.reports()[-1].stranded == []
        world.engine.running.add("r")
        await world.step()
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
        await world.step()
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
