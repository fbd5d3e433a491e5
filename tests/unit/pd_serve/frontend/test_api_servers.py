"""What API servers tell each other, and their calls of each other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from pd_serve.comm.membership import ApiServerInfo, ApiServerStatus, Membership, MembershipView
from pd_serve.comm.requests import Call, ReadMetrics
from pd_serve.comm.rpc import Answer, RpcClient
from pd_serve.comm.timing import HEARTBEAT_S, STATUS_INTERVAL_S
from pd_serve.frontend.api_servers import ApiServers
from pd_serve.frontend.snapshot import ApiServerSnapshot
from tests.members import membership
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time


@dataclass
class OneApiServer:
    """The API server "api" among others, all of which are in the hands of a test."""

    wire: RecordingWire
    members: MembershipView
    servers: ApiServers
    calls: RpcClient
    num_requests: int = 0

    def tell(self, message: Membership) -> None:
        change = self.members.update(message)
        assert change is not None
        self.servers.on_left(change.api_servers_left)

    def told(self, name: str) -> list[int]:
        return [status.requests for status in self.wire.sent_to(ApiServerStatus, name)]


@asynccontextmanager
async def one_of(*names: str) -> AsyncIterator[OneApiServer]:
    wire = RecordingWire("api")
    members = MembershipView("api", wire)
    calls = RpcClient(wire, Call)
    world = OneApiServer(wire, members, ApiServers(wire, members, calls), calls)
    world.servers.counts |= {"requests": lambda: world.num_requests, "pages": lambda: 1}
    world.tell(membership("p0", "d0", api_servers=names))
    world.servers.open()
    await asyncio.sleep(0)
    yield world
    await world.servers.close()


@in_virtual_time
async def test_a_change_is_told_to_all_others_soon_and_the_rest_as_a_heartbeat() -> None:
    async with one_of("api", "b", "c") as world:
        world.num_requests = 7
        await asyncio.sleep(1.5 * STATUS_INTERVAL_S)
        assert world.told("b") == world.told("c") == [0, 7]
        await asyncio.sleep(3 * HEARTBEAT_S)
        assert set(world.told("b")[2:]) == {7}
        assert 2 <= len(world.told("b")[2:]) <= 4
        assert world.told("api") == world.told("d0") == []


@in_virtual_time
async def test_one_that_joins_later_is_told_at_once() -> None:
    async with one_of("api", "b") as world:
        await asyncio.sleep(1.5 * STATUS_INTERVAL_S)
        world.tell(membership("p0", "d0", api_servers=["api", "b", "c"]))
        await asyncio.sleep(1.5 * STATUS_INTERVAL_S)
        assert world.told("c")[:1] == [0]


@in_virtual_time
async def test_the_others_count_until_they_leave() -> None:
    async with one_of("api", "b", "c") as world:
        world.num_requests = 1
        world.servers.on_status("b", ApiServerStatus(requests=10, connections=5))
        world.servers.on_status("c", ApiServerStatus(requests=100))
        world.servers.on_status("stranger", ApiServerStatus(requests=1000))
        assert (world.servers.elsewhere("requests"), world.servers.elsewhere("connections")) == (110, 5)
        assert world.servers.everywhere("requests") == 111
        assert [(row.id, row.requests) for row in world.servers.snapshot()] == [
            ("api", 1),
            ("b", 10),
            ("c", 100),
        ]
        world.tell(membership("p0", "d0", api_servers=["api", "b"]))
        assert world.servers.elsewhere("requests") == 10
        assert [row.id for row in world.servers.snapshot()] == ["api", "b"]


@in_virtual_time
async def test_another_process_of_the_same_name_has_not_told_anything_yet() -> None:
    async with one_of("api", "b") as world:
        world.servers.on_status("b", ApiServerStatus(requests=10))
        members = membership("p0", "d0", api_servers=["api", "b"])
        anew = {**members.api_servers, "b": ApiServerInfo("tcp://b2", "tcp://b2/tokens", pid=9)}
        world.tell(replace(members, api_servers=anew))
        assert world.servers.elsewhere("requests") == 0
        assert world.servers.snapshot()[1] == ApiServerSnapshot("b", 9, 0)


@in_virtual_time
async def test_calls_leave_out_who_dies_at_once_and_who_is_silent_after_a_time() -> None:
    async with one_of("api", "b", "c") as world:
        loop = asyncio.get_running_loop()
        begin = loop.time()

        def ask() -> "asyncio.Task[dict[str, str]]":
            requests = dict.fromkeys(world.servers.others, ReadMetrics())
            return asyncio.create_task(world.servers.ask_others(requests, 2.0))

        first, second = ask(), ask()
        await asyncio.sleep(0.5)
        answered, _ = world.wire.sent_to(Call, "b")
        world.calls.on_answer("b", Answer(answered.call_id, "text of b"))
        world.tell(membership("p0", "d0", api_servers=["api", "b"]))
        assert (await first, loop.time() - begin) == ({"b": "text of b"}, 0.5)
        assert (await second, loop.time() - begin) == ({}, 2.0)
