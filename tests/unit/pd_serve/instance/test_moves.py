"""Moves that the scheduler orders or an operator requests."""

import asyncio

import pytest

from migration.errors import Refusal, RefusalCode
from migration.messages import (
    InstanceId,
    Offer,
    Refused,
)
from migration.record import MigrationRecord
from pd_serve.comm.messages import (
    MigrationEnded,
    MoveOut,
    SetRole,
)
from pd_serve.comm.requests import (
    Call,
    MoveRequest,
)
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import REFUSED_MOVE_S
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.unit.pd_serve.made_migrations import FULL
from tests.virtual_time import in_virtual_time


def order_move(
    world: World, selection: str = "shortest", reason: str = "balance", to: InstanceLoad | str = "d0"
) -> None:
    """The scheduler orders a move."""
    if isinstance(to, str):
        to = InstanceLoad(to, "decode", total_blocks=100, free_blocks=100)
    world.hear("scheduler", MoveOut(to, reason, PolicyChoice(selection)))


@in_virtual_time
async def test_a_move_request_is_answered_with_the_record_of_the_migration() -> None:
    async with World() as world:
        world.engine.running.add("r")
        world.hear("api", Call("call", MoveRequest(R, InstanceId("d0"))))
        await world.settle()
        await world.move("d0")
        (answer,) = world.sent(Answer, "api")
        assert (answer.call_id, answer.error) == ("call", None)
        assert isinstance(answer.result, MigrationRecord)
        assert (answer.result.committed, answer.result.tokens) == (True, 12)
        assert [ended.record.committed for ended in world.sent(MigrationEnded, "api")] == [True]


@in_virtual_time
async def test_a_move_of_a_request_that_does_not_run_here_is_refused() -> None:
    async with World() as world:
        answer = await world.call(MoveRequest(R, InstanceId("d0")))
        assert answer.result.refusal == Refusal(RefusalCode.NOT_HERE, "not here")


@in_virtual_time
async def test_a_move_to_the_instance_itself_is_refused() -> None:
    async with World() as world:
        world.engine.running.add("r")
        answer = await world.call(MoveRequest(R, InstanceId("p0")))
        assert answer.result.refusal == Refusal(RefusalCode.ALREADY_HERE, "the request is on p0 already")


@in_virtual_time
async def test_a_move_that_its_destination_refuses_is_answered_with_the_refusal() -> None:
    async with World() as world:
        world.engine.running.add("r")
        world.hear("api", Call("call", MoveRequest(R, InstanceId("d0"))))
        await world.settle()
        await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
        (answer,) = world.sent(Answer, "api")
        assert answer.result.refusal == FULL.prefixed("refused")


def refused(world: World) -> dict[str, int]:
    stats = world.llumlet.reporter.stats()
    assert stats is not None
    return {reason: count for reason, count in stats.refused_orders.items() if count}


@in_virtual_time
async def test_an_order_with_an_unknown_policy_is_refused_and_counts_as_decided() -> None:
    async with World() as world:
        world.engine.running.add("r")
        order_move(world, "mine")
        await world.settle()
        assert not world.sent(Offer)
        assert world.llumlet.reporter.load().moves_decided == 1
        assert world.fatal == []
        assert refused(world) == {"policy": 1}


@pytest.mark.parametrize("destination", ["d9", "p0", "", "api", "manager"])
@in_virtual_time
async def test_an_order_to_move_to_no_other_instance_is_refused(destination: str) -> None:
    """It has ended, it is this instance, or it is none."""
    async with World() as world:
        world.engine.running.add("r")
        order_move(world, to=destination)
        await world.settle()
        assert not world.sent(Offer)
        assert world.llumlet.reporter.load().moves_decided == 1
        assert refused(world) == {"destination": 1}
        assert world.fatal == []


@in_virtual_time
async def test_an_unknown_role_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with World() as world:
        world.hear("scheduler", SetRole("verifier"))
        await world.settle()
        assert world.llumlet.reporter.load().role == "prefill"
        assert refused(world) == {"role": 1}
        assert "there is no role 'verifier'" in caplog.text


@in_virtual_time
async def test_a_flood_of_orders_is_bounded_and_every_one_counts_as_decided() -> None:
    async with World() as world:
        world.engine.held["running_requests"] = asyncio.Event()  # a long step
        for _ in range(1000):
            order_move(world)
        await world.settle()
        assert len(world.engine.called("running_requests")) == 256
        world.engine.held["running_requests"].set()
        await world.settle()
        assert world.llumlet.reporter.load().moves_decided == 1000
        assert refused(world) == {"too_many": 1000 - 256}


@in_virtual_time
async def test_an_order_with_senseless_numbers_does_not_end_the_instance() -> None:
    numbers = {"total_blocks": -5, "free_blocks": -(2**62), "block_tokens": 0, "running": -1}
    async with World() as world:
        world.engine.running.add("r")
        for selection in ("shortest", "latest", "guarded", "levelling", "drain"):
            for reason in ("balance", "drain", "", "\u2603" * 1000):
                order_move(world, selection, reason, InstanceLoad("d0", "no role", **numbers))  # type: ignore[arg-type]
        await world.settle()
        assert world.llumlet.reporter.load().moves_decided == 20
        assert world.fatal == []


@in_virtual_time
async def test_an_order_whose_handling_fails_is_counted_and_does_not_end_the_instance() -> None:
    async with World() as world:
        world.engine.fail["running_requests"] = KeyError("a bug")
        order_move(world)
        await world.settle()
        assert world.fatal == []
        assert world.llumlet.reporter.load().moves_decided == 1
        assert "a background task failed" in (await world.llumlet.check_integrity())[0]


@in_virtual_time
async def test_an_order_moves_the_request_that_the_policy_selects() -> None:
    async with World() as world:
        world.engine.running |= {"high", "normal"}
        world.engine.priorities["high"] = -1
        order_move(world)
        await world.settle()
        assert world.llumlet.reporter.load().moves_decided == 1
        assert world.reports()[-1].load.migrating_out == 1
        await world.move("d0")
        (ended,) = world.sent(MigrationEnded, "api")
        record = ended.record
        assert (record.request_id, record.destination, record.reason) == ("normal", "d0", "balance")
        assert record.committed


@in_virtual_time
async def test_repeated_orders_move_each_request_once() -> None:
    async with World() as world:
        world.engine.running |= {"a", "b"}
        for _ in range(3):
            order_move(world)
        await world.settle()
        assert {offer.request.request_id for offer in world.sent(Offer, "d0")} == {"a", "b"}
        assert world.llumlet.reporter.load().moves_decided == 3


@in_virtual_time
async def test_only_a_drain_moves_requests_of_high_priority() -> None:
    async with World() as world:
        world.engine.running.add("high")
        world.engine.priorities["high"] = -1
        order_move(world)
        await world.settle()
        assert not world.sent(Offer)
        order_move(world, "drain", "drain")
        await world.settle()
        assert len(world.sent(Offer, "d0")) == 1


@in_virtual_time
async def test_a_refused_move_leaves_the_request_running_here() -> None:
    async with World() as world:
        world.engine.running.add("r")
        order_move(world)
        await world.settle()
        await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
        assert world.llumlet.reporter.load().migrating_out == 0
        assert "r" in world.engine.running
        assert world.fatal == []


@in_virtual_time
async def test_after_a_refusal_another_request_moves_and_the_refused_one_is_tried_again_later() -> None:
    """What the destination refuses, such as an adapter that has no slot there, is often about one request."""
    async with World() as world:
        world.engine.running |= {"refused", "other"}
        world.engine.priorities["other"] = -1  # a drain moves it last

        def offered() -> list[str]:
            return [offer.request.request_id for offer in world.sent(Offer, "d0")]

        order_move(world, "drain", "drain")
        await world.settle()
        await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
        order_move(world, "drain", "drain")
        await world.settle()
        assert offered() == ["refused", "other"]

        await asyncio.sleep(REFUSED_MOVE_S)
        order_move(world, "drain", "drain")
        await world.settle()
        assert offered() == ["refused", "other", "refused"]


@in_virtual_time
async def test_a_refused_request_moves_to_another_instance_at_once() -> None:
    async with World() as world:
        world.engine.running.add("r")
        order_move(world)
        await world.settle()
        await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
        order_move(world, to="d1")
        await world.settle()
        assert len(world.sent(Offer, "d1")) == 1
