"""Requests that wait for the prefix of their prompt before they are queued."""

import asyncio

from migration.bounds import MigrationBounds
from migration.errors import Refusal, RefusalCode
from migration.prefix_messages import PrefixAsk, PrefixRefused
from pd_serve.comm.messages import AbortRequests, AddRequest, RequestFailed
from pd_serve.comm.timing import REQUEST_REPORT_INTERVAL_S
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.virtual_time import in_virtual_time

BOUNDS = MigrationBounds()
CLIENT = "tcp://api/tokens"


async def refuse(world: World) -> None:
    ask = world.sent(PrefixAsk, "d0")[-1]
    world.hear("d0", PrefixRefused(ask.copy_id, Refusal(RefusalCode.NOT_HERE, "none")))
    await world.settle()


@in_virtual_time
async def test_a_request_is_queued_when_its_prefix_is_here_or_will_not_come() -> None:
    async with World() as world:
        world.add(prefix_from="d0")
        await world.settle()
        assert len(world.sent(PrefixAsk, "d0")) == 1
        assert not world.engine.called("add")
        assert world.llumlet.reporter.load().requests_added == 0
        await refuse(world)
        assert len(world.engine.called("add")) == 1
        assert world.llumlet.reporter.load().requests_added == 1


@in_virtual_time
async def test_a_request_waits_no_longer_than_the_bound_of_an_answer() -> None:
    async with World() as world:
        world.add(prefix_from="d0")
        await asyncio.sleep(BOUNDS.prefix_reply_s + 0.1)
        assert len(world.engine.called("add")) == 1


@in_virtual_time
async def test_a_waiting_request_is_reported_to_its_api_server() -> None:
    """So that it is not taken for lost."""
    async with World() as world:
        world.hear("api", AddRequest(R, CLIENT, 0, None, [], "d0"), b"payload")
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)
        await world.settle()
        client, report = world.publisher.reports[-1]
        assert (client, [held.request_id for held in report.requests]) == (CLIENT, [R])
        assert not world.engine.called("add")


@in_virtual_time
async def test_a_request_whose_client_leaves_meanwhile_is_not_queued() -> None:
    async with World() as world:
        world.add(handoff=["d0"], prefix_from="d0")
        await world.settle()
        world.hear("api", AbortRequests([R]))
        await world.settle()
        await refuse(world)
        assert not world.engine.called("add")
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_an_abort_of_older_copies_leaves_a_newer_one_waiting() -> None:
    async with World() as world:
        world.add(epoch=1000, prefix_from="d0")
        await world.settle()
        world.hear("api", AbortRequests([R], 1000))
        await world.settle()
        await refuse(world)
        assert len(world.engine.called("add")) == 1


@in_virtual_time
async def test_a_recompute_replaces_the_copy_that_waits() -> None:
    async with World() as world:
        world.add(prefix_from="d0")
        await world.settle()
        world.add(epoch=1000)
        await world.settle()
        await refuse(world)
        ((_, _, options),) = world.engine.called("add")
        assert options["epoch"] == 1000


@in_virtual_time
async def test_a_prompt_that_cannot_be_read_is_answered_with_its_error() -> None:
    async with World() as world:

        def query(payload: list[bytes]) -> None:
            raise ValueError("nonsense")

        world.engine.prefixes.query = query  # type: ignore[method-assign, assignment]
        world.add(prefix_from="d0")
        await world.settle()
        assert world.sent(RequestFailed, "api") == [RequestFailed(R, "ValueError: nonsense")]
        assert await world.llumlet.check_integrity() == []
