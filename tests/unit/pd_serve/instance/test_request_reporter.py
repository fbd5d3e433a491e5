"""Reports of an instance's requests to their API servers."""

import asyncio

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from pd_serve.comm.messages import AddRequest, Heartbeat, ResendTokens
from pd_serve.comm.timing import API_SERVER_LEASE_S, REQUEST_REPORT_INTERVAL_S
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.virtual_time import in_virtual_time

CLIENT = "tcp://api/tokens"
HELD = HeldRequest(R, 3, 7)


async def a_report(world: World) -> list[tuple[str, list[HeldRequest], int]]:
    """Client, requests and heartbeat of the next reports."""
    world.publisher.reports.clear()
    await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)
    await world.settle()
    return [(client, report.requests, report.heartbeat) for client, report in world.publisher.reports]


@in_virtual_time
async def test_every_api_server_gets_its_own_requests_and_its_own_last_heartbeat() -> None:
    async with World() as world:
        world.members("d0", api_servers=["api", "other"])
        world.engine.held_by_client = {CLIENT: [HELD]}
        world.hear("api", Heartbeat(number=4))
        world.hear("other", Heartbeat(number=9))
        world.hear("stranger", Heartbeat(number=2))

        assert await a_report(world) == [(CLIENT, [HELD], 4), ("tcp://other/tokens", [], 9)]


@in_virtual_time
async def test_numbers_of_reports_count_up_and_are_in_load_reports() -> None:
    async with World() as world:
        await a_report(world)
        first = world.publisher.reports[-1][1].number
        await a_report(world)

        assert world.publisher.reports[-1][1].number == first + 1
        assert world.reports()[-1].request_reports in (first, first + 1)


@in_virtual_time
async def test_a_request_that_the_engine_does_not_have_yet_is_reported() -> None:
    async with World() as world:
        world.engine.held["add"] = asyncio.Event()
        world.hear("api", AddRequest(R, CLIENT, 1000, None, [5, 6]), b"payload")

        assert await a_report(world) == [(CLIENT, [HeldRequest(R, 1000, 2)], 0)]
        world.engine.held["add"].set()
        assert await a_report(world) == [(CLIENT, [], 0)]


@in_virtual_time
async def test_a_request_that_arrives_twice_is_added_once_in_each_epoch() -> None:
    async with World() as world:
        for epoch in (0, 0, 1000, 0, 1000):
            world.add(epoch=epoch)
            await world.settle()

        assert [options["epoch"] for _, _, options in world.engine.called("add")] == [0, 1000]


@in_virtual_time
async def test_reports_do_not_pile_up_during_a_long_step() -> None:
    async with World() as world:
        world.engine.held["visit_requests"] = asyncio.Event()
        await asyncio.sleep(20 * REQUEST_REPORT_INTERVAL_S)
        assert len(world.engine.called("visit_requests")) == 1
        world.engine.held.pop("visit_requests").set()
        await world.settle()

        assert len(world.publisher.reports) == 1


@in_virtual_time
async def test_everything_that_is_kept_for_an_api_server_ends_with_it_and_its_requests() -> None:
    async with World() as world:
        world.engine.held_by_client = {CLIENT: [HELD]}
        await a_report(world)
        assert world.publisher.retained == {CLIENT}

        world.members("d0", api_servers=[])
        await a_report(world)
        assert world.publisher.retained == {CLIENT}
        world.engine.held_by_client = {}
        await a_report(world)
        assert world.publisher.retained == set()


@in_virtual_time
async def test_requests_of_an_api_server_that_is_no_member_are_ended_after_a_lease() -> None:
    """Its request was in transit when the manager took it out of the membership."""
    async with World() as world:
        late = "tcp://late/tokens"
        world.engine.held_by_client = {late: [HELD], CLIENT: []}
        await asyncio.sleep(API_SERVER_LEASE_S)
        assert world.engine.called("abort_client") == []

        await asyncio.sleep(2 * REQUEST_REPORT_INTERVAL_S)

        assert world.engine.called("abort_client")[0] == [late]


@in_virtual_time
async def test_tokens_are_sent_again_on_demand() -> None:
    async with World() as world:
        world.hear("api", ResendTokens([(R, 3), (RequestId("s"), 0)]))
        await world.settle()

        assert world.engine.called("resend") == [[[(R, 3), ("s", 0)]]]
