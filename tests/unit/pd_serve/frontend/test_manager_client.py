"""An API server's link to the manager: search, join, heartbeats, state and calls."""

import asyncio
from types import TracebackType
from typing import Any

import pytest

from pd_serve.comm.cluster_state import ClusterState, RestartState, SchedulerState
from pd_serve.comm.membership import MANAGER, SCHEDULER, ApiServerInfo, Join, MembershipView
from pd_serve.comm.messages import Heartbeat, ToApiServer
from pd_serve.comm.requests import Call, RestartInstances
from pd_serve.comm.rpc import Answer, RpcClient
from pd_serve.comm.timing import CALL_TIMEOUT_S, HEARTBEAT_S, MANAGER_LEASE_S, POLL_S
from pd_serve.errors import EngineDeadError, MigrationRefusedError
from pd_serve.frontend.manager_client import ManagerClient
from router.request import Demand
from tests.members import membership
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time

INFO = ApiServerInfo("tcp://api", "tcp://api/tokens")
STATE = ClusterState(
    starting=[],
    scheduler=SchedulerState("alive", "llumnix", 7, 2),
    scaled=[],
    decisions=[],
    restart=RestartState(True, "1 of 3 done"),
)


class World:
    """A manager client. A test plays the manager.

    Attributes:
        found: Address at which the manager is found; an error is raised; None: the search hangs.
        searches: Number of searches.
        unused: Instances that this API server does not use.
        leaving: Instances that the manager is going to stop.
    """

    def __init__(self, found: str | Exception | None = "tcp://manager") -> None:
        self.found = found
        self.searches = 0
        self.unused: set[str] = set()
        self.leaving: list[str] = []
        self.wire = RecordingWire("api")
        self.members = MembershipView("api", self.wire)
        calls = RpcClient(self.wire, Call)
        self.wire.listen(ToApiServer, lambda sender, answer, _: calls.on_answer(sender, answer))
        self.client = ManagerClient(
            self.wire, self.members, calls, self._find, lambda: Demand(2, 300), self.unused.__contains__
        )

    async def __aenter__(self) -> "World":
        self.client.open(INFO)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()

    async def _find(self) -> str:
        self.searches += 1
        if self.found is None:
            await asyncio.Event().wait()
        if isinstance(self.found, Exception):
            raise self.found
        return str(self.found)

    async def tell_members(self, seconds: float = 0.0) -> None:
        """The manager sends the membership for this time."""
        for _ in range(1 + round(seconds / HEARTBEAT_S)):
            self.members.update(
                membership("p0", "d0", api_servers=["api"], scheduler="tcp://scheduler", leaving=self.leaving)
            )
            await asyncio.sleep(HEARTBEAT_S)

    def joins(self) -> list[Join]:
        return self.wire.sent_to(Join, MANAGER)


@in_virtual_time
async def test_the_manager_is_found_and_joined() -> None:
    async with World() as world:
        await asyncio.sleep(POLL_S)

        assert world.wire.peers == {MANAGER: "tcp://manager"}
        assert world.joins() == [Join(INFO, [])]


@in_virtual_time
async def test_a_join_is_repeated_as_a_heartbeat_without_another_search() -> None:
    async with World() as world:
        await asyncio.sleep(POLL_S)
        await world.tell_members(10.0)

        assert len(world.joins()) == pytest.approx(10, abs=2)
        assert world.searches == 1


@pytest.mark.parametrize(
    "absent",
    [EngineDeadError("the manager is absent"), RuntimeError("no replica"), None],
    ids=["absent", "error of Ray Serve", "hangs"],
)
@in_virtual_time
async def test_a_manager_that_cannot_be_found_is_searched_again(absent: Exception | None) -> None:
    async with World(found=absent) as world:
        await asyncio.sleep(3 * MANAGER_LEASE_S)
        assert world.searches > 1
        assert world.joins() == []

        world.found = "tcp://manager"
        await asyncio.sleep(2 * MANAGER_LEASE_S + HEARTBEAT_S)

        assert world.joins()


@in_virtual_time
async def test_a_silent_manager_is_searched_and_its_successor_joined() -> None:
    async with World() as world:
        await world.tell_members()
        world.found = "tcp://successor"
        await asyncio.sleep(2 * MANAGER_LEASE_S + HEARTBEAT_S)

        assert world.wire.peers[MANAGER] == "tcp://successor"
        assert world.searches > 1


@in_virtual_time
async def test_a_leaving_instance_is_named_as_soon_as_it_is_unused() -> None:
    async with World() as world:
        world.leaving = ["d0"]
        world.unused.add("p0")
        await world.tell_members(3.0)
        assert {tuple(join.unused) for join in world.joins()} == {()}, "d0 is used, and p0 does not leave"

        world.unused.add("d0")
        await asyncio.sleep(2 * POLL_S)
        assert world.joins()[-1].unused == ["d0"]

        world.unused.discard("d0")
        await asyncio.sleep(2 * POLL_S)
        assert world.joins()[-1].unused == []


@in_virtual_time
async def test_heartbeats_with_the_waiting_demand_go_to_instances_and_the_scheduler() -> None:
    async with World() as world:
        await world.tell_members(2.0)

        for peer in ("p0", "d0", SCHEDULER):
            heartbeats = world.wire.sent_to(Heartbeat, peer)
            assert {heartbeat.waiting for heartbeat in heartbeats} == {Demand(2, 300)}
            assert [heartbeat.number for heartbeat in heartbeats] == [1, 2, 3]
        assert world.wire.sent_to(Heartbeat, MANAGER) == []


@in_virtual_time
async def test_closing_ends_joins_and_heartbeats() -> None:
    async with World() as world:
        await world.tell_members()
    sent = len(world.wire.sent)

    await asyncio.sleep(100)

    assert len(world.wire.sent) == sent


# ---- state


@in_virtual_time
async def test_before_its_first_message_the_manager_is_absent_and_has_no_state() -> None:
    client = World().client

    assert not client.is_alive
    assert client.state is None


@in_virtual_time
async def test_the_state_of_a_manager_that_is_alive_is_as_it_was_sent() -> None:
    world = World()
    await world.tell_members()
    world.client.on_state(STATE)

    assert world.client.is_alive
    assert world.client.state == STATE


@in_virtual_time
async def test_without_a_manager_the_scheduler_is_absent_and_no_restart_runs() -> None:
    world = World()
    await world.tell_members()
    world.client.on_state(STATE)
    await asyncio.sleep(MANAGER_LEASE_S)

    assert not world.client.is_alive
    state = world.client.state
    assert state is not None
    assert state.scheduler == SchedulerState("absent", "llumnix", 7, 2)
    assert state.restart == RestartState(False, "1 of 3 done")
    assert state.scheduler_stats is None


# ---- calls


async def call(world: World) -> "asyncio.Task[Any]":
    task: asyncio.Task[Any] = asyncio.create_task(world.client.call(RestartInstances()))
    await asyncio.sleep(0)
    return task


@in_virtual_time
async def test_a_call_is_answered_by_the_manager() -> None:
    world = World()
    await world.tell_members()
    task = await call(world)

    [sent] = world.wire.sent_to(Call, MANAGER)
    world.wire.hear(MANAGER, Answer.of(sent.call_id, MigrationRefusedError("a restart is under way")))

    with pytest.raises(MigrationRefusedError, match="a restart is under way"):
        await task


@in_virtual_time
async def test_a_call_to_an_absent_manager_fails_without_a_message() -> None:
    world = World()

    with pytest.raises(EngineDeadError, match="the manager is absent"):
        await world.client.call(RestartInstances())
    assert world.wire.sent == []


@in_virtual_time
async def test_a_call_that_the_manager_does_not_answer_fails_after_the_time_out() -> None:
    world = World()
    await world.tell_members()
    task = await call(world)

    await asyncio.sleep(CALL_TIMEOUT_S)

    with pytest.raises(EngineDeadError, match="the manager does not answer"):
        await task


@in_virtual_time
async def test_a_call_to_a_manager_that_is_gone_fails_with_its_lease() -> None:
    async with World() as world:
        await world.tell_members()
        task = await call(world)

        await asyncio.sleep(2 * MANAGER_LEASE_S)

        with pytest.raises(EngineDeadError, match="manager has died"):
            await task
