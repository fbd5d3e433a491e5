"""What an instance answers about requests whose API server is gone, or may be."""

import asyncio

import pytest

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from pd_serve.comm.messages import AddRequest, Heartbeat
from pd_serve.comm.requests import Adopt, FindOrphan, OrphanAnswer
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import REQUEST_REPORT_INTERVAL_S
from pd_serve.instance import orphans
from tests.unit.pd_serve.instance.instance_world import World
from tests.virtual_time import in_virtual_time

OURS, THEIRS = "tcp://api/tokens", "tcp://other/tokens"
R = RequestId("mine.digest-1")
FIND = FindOrphan("mine.digest")
ADOPT = Adopt(RequestId("mine.digest-2"), OURS, [b"payload"])


def world_with(world: World, client: str) -> None:
    """The request is here."""
    world.members("d0", api_servers=["api", "other"])
    world.hear("api", AddRequest(R, client, 0, None, []), b"payload")
    world.engine.held_by_client = {client: [HeldRequest(R, 0, 3)]}


async def beat(world: World, *api_servers: str, seconds: int) -> None:
    for number in range(1, seconds + 1):
        for name in api_servers:
            world.hear(name, Heartbeat(number=number))
        await asyncio.sleep(1.0)


@in_virtual_time
async def test_a_request_that_was_never_here_needs_no_visit_of_the_engine() -> None:
    async with World(orphan_s=30.0) as world:
        assert (await world.call(FIND)).result.state == "unknown"
        assert not world.engine.called("clients_of")


@in_virtual_time
async def test_it_is_doubtful_while_its_api_server_is_heard_and_an_orphan_after_3_seconds() -> None:
    async with World(orphan_s=30.0) as world:
        world_with(world, THEIRS)
        await beat(world, "api", "other", seconds=2)
        answer = (await world.call(FIND)).result
        assert (answer.state, answer.heartbeat) == ("doubtful", 2)
        await beat(world, "api", seconds=4)
        assert (await world.call(FIND)).result.state == "orphan"


@in_virtual_time
async def test_it_is_an_orphan_at_once_when_its_api_server_has_left() -> None:
    async with World(orphan_s=30.0) as world:
        world_with(world, THEIRS)
        await beat(world, "api", "other", seconds=1)
        world.members("d0", api_servers=["api"])
        assert (await world.call(FIND)).result.state == "orphan"
        assert (await world.call(ADOPT)).result is True
        assert world.engine.called("adopt")[-1][-1] == {OURS}


@in_virtual_time
async def test_a_request_of_the_api_server_that_asks_is_no_orphan() -> None:
    async with World(orphan_s=30.0) as world:
        world_with(world, OURS)
        await beat(world, "api", "other", seconds=1)
        assert (await world.call(FIND)).result.state == "known"
        assert (await world.call(ADOPT)).result is False


@in_virtual_time
async def test_it_is_an_orphan_although_its_api_server_was_never_heard_here() -> None:
    """It has moved here, to an instance that was started after its API server had died."""
    async with World(orphan_s=30.0) as world:
        world_with(world, THEIRS)
        await beat(world, "api", seconds=2)
        assert (await world.call(FIND)).result == OrphanAnswer("doubtful", 0)
        await beat(world, "api", seconds=3)
        assert (await world.call(FIND)).result.state == "orphan"


@in_virtual_time
async def test_the_silence_of_all_others_says_nothing() -> None:
    """This process was suspended, or cut off."""
    async with World(orphan_s=30.0) as world:
        world_with(world, THEIRS)
        await beat(world, "api", "other", seconds=1)
        await asyncio.sleep(60.0)
        assert (await world.call(FIND)).result.state == "doubtful"


@in_virtual_time
async def test_a_long_step_does_not_delay_the_answer() -> None:
    async with World(orphan_s=30.0) as world:
        world_with(world, THEIRS)
        world.engine.held["clients_of"] = asyncio.Event()
        asking = asyncio.ensure_future(world.call(FIND))
        await asyncio.sleep(1.0)
        asking.cancel()
        assert world.sent(Answer, "api")[-1].result.state == "doubtful"


@in_virtual_time
async def test_the_number_of_kept_stems_is_bounded() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orphans, "MAX_STEMS", 5)
        async with World(orphan_s=30.0) as world:
            for number in range(20):
                world.llumlet._orphans.note(f"{number}.digest-1")
            assert len(world.llumlet._orphans._stems) == 5


@in_virtual_time
async def test_requests_of_an_api_server_that_left_end_after_their_time_and_are_counted() -> None:
    async with World(orphan_s=5.0) as world:
        world_with(world, THEIRS)
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S * 2)
        world.members("d0", api_servers=["api"])
        await asyncio.sleep(4.0)
        assert not world.engine.called("abort_client")
        await asyncio.sleep(2.0)
        assert world.engine.called("abort_client")[0] == [THEIRS]
        assert world.llumlet._requests.num_orphans_ended > 0
