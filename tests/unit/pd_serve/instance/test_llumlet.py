"""The llumlet: requests, aborts, membership and remote calls."""

import asyncio

from migration.messages import (
    MigrationId,
    Offer,
    RequestDescription,
    RequestId,
)
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    Heartbeat,
    LoadReport,
    MigrationEnded,
    RequestFailed,
)
from pd_serve.comm.requests import (
    CallEngine,
    CheckIntegrity,
    ListRequests,
)
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S, ORPHAN_S, STEP_S
from pd_serve.errors import DestinationRefusedError, EngineDeadError, RefusalCode
from tests.members import membership
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_request_is_added_to_the_engine_with_its_frames_unchanged() -> None:
    async with World() as world:
        message = AddRequest(R, "api/tokens", 0, ["d0"], [])
        world.hear("api", message, b"one", b"two")
        await world.settle()
        options = {"epoch": 0, "output_token_ids": [], "handoff": True}
        assert world.engine.called("add") == [[[b"one", b"two"], "api/tokens", options]]
        assert not world.engine.called("abort")
        assert world.llumlet.reporter.load().requests_added == 1


@in_virtual_time
async def test_a_request_that_the_engine_rejects_is_answered_with_its_error() -> None:
    """The instance goes on."""
    async with World() as world:
        world.engine.fail["add"] = ValueError("nonsense")
        world.add(handoff=["d0"])
        await world.settle()
        assert world.sent(RequestFailed, "api") == [RequestFailed(R, "ValueError: nonsense")]
        assert not world.fatal
        assert await world.llumlet.check_integrity() == []


@in_virtual_time
async def test_a_lost_request_whose_grammar_cannot_be_followed_is_answered_as_invalid() -> None:
    async with World() as world:
        world.engine.fail["add"] = DestinationRefusedError(RefusalCode.GRAMMAR, "no such grammar")
        world.add()
        await world.settle()
        assert world.sent(RequestFailed, "api") == [RequestFailed(R, "no such grammar", is_invalid=True)]


@in_virtual_time
async def test_a_dead_engine_ends_the_instance() -> None:
    async with World() as world:
        world.engine.fail["add"] = EngineDeadError("gone")
        world.add()
        await world.settle()
        assert [type(error) for error in world.fatal] == [EngineDeadError]


@in_virtual_time
async def test_a_recomputed_request_ends_its_older_copy_first() -> None:
    """The older copy has a lower epoch. Its end does not touch the new one."""
    async with World() as world:
        world.engine.running.add("r")
        world.add(handoff=["d0"], epoch=1000)
        await world.settle()
        assert [call[0] for call in world.engine.calls] == ["abort", "add"]
        assert world.engine.called("abort") == [[[R], 1000]]
        await world.start_prefill()
        assert len(world.sent(Offer, "d0")) == 1


@in_virtual_time
async def test_a_recomputed_request_does_not_wait_for_its_arriving_copy() -> None:
    """The engine refuses the commit of an older copy, and its source may be slow."""
    async with World() as world:
        world.engine.held["reserve"] = asyncio.Event()
        description = RequestDescription(R, [b"payload"], "client", 0, 0, [1], 10, 100, {})
        world.hear("d0", Offer(MigrationId("m"), "test", description, b""))
        await world.settle()
        world.add(epoch=1000)
        await world.settle()
        assert world.engine.called("add")
        world.engine.held["reserve"].set()


@in_virtual_time
async def test_an_abort_reaches_the_engine() -> None:
    async with World() as world:
        world.engine.running.add("r")
        world.hear("api", AbortRequests([R], 7))
        await world.settle()
        assert world.engine.called("abort") == [[[R], 7]]
        assert not world.sent(AbortRequests)


@in_virtual_time
async def test_an_abort_is_passed_on_once_for_a_request_that_has_moved() -> None:
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        await world.move("d1")
        for _ in range(2):
            world.hear("api", AbortRequests([R, RequestId("unknown")], 7))
            await world.settle()
        assert world.sent(AbortRequests, "d1") == [AbortRequests([R], 7)]


@in_virtual_time
async def test_an_abort_is_not_passed_on_for_a_request_that_was_added_again() -> None:
    """It runs here again, so its earlier destination has nothing of it."""
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        await world.move("d1")
        world.add(epoch=1000)
        await world.settle()
        world.hear("api", AbortRequests([R]))
        await world.settle()
        assert not world.sent(AbortRequests)


@in_virtual_time
async def test_membership_connects_the_instance_to_all_other_members() -> None:
    async with World() as world:
        world.members("d0", "d1", scheduler="tcp://scheduler")
        assert world.wire.peers == {
            "manager": "tcp://manager",
            "api": "tcp://api",
            "scheduler": "tcp://scheduler",
            "d0": "tcp://d0",
            "d1": "tcp://d1",
        }


@in_virtual_time
async def test_a_peer_that_leaves_the_membership_ends_the_migrations_with_it() -> None:
    async with World() as world:
        world.add(handoff=["d1", "d0"])
        await world.start_prefill()
        world.members("d0")
        await world.settle()
        assert "d1" not in world.wire.peers
        assert [ended.record.why for ended in world.sent(MigrationEnded)] == ["d1 died"]
        assert len(world.sent(Offer, "d0")) == 1  # the next candidate


@in_virtual_time
async def test_membership_of_an_earlier_manager_changes_nothing() -> None:
    async with World() as world:
        world.hear("manager", membership("p0", "d0", "d1", api_servers=["api"], term=2))
        world.hear("manager", membership("p0", term=1))
        await world.settle()
        assert {"d0", "d1", "api"} <= set(world.wire.peers)
        assert not world.engine.called("abort_client")


@in_virtual_time
async def test_an_api_server_that_leaves_the_membership_has_its_requests_ended() -> None:
    async with World() as world:
        world.members("d0", "d1", api_servers=["other"])
        await world.settle()
        assert world.engine.called("abort_client") == [["tcp://api/tokens"]]
        assert "api" not in world.wire.peers
        assert "other" in world.wire.peers


@in_virtual_time
async def test_an_instance_without_a_manager_runs_as_long_as_an_api_server_sends_heartbeats() -> None:
    """The manager is absent; the API server is not."""
    async with World() as world:
        for _ in range(5):
            await asyncio.sleep(ORPHAN_S / 2)
            world.hear("api", Heartbeat())
        assert not world.fatal
        await asyncio.sleep(ORPHAN_S + 2 * INSTANCE_HEARTBEAT_S)
        assert [type(error) for error in world.fatal] == [EngineDeadError]


@in_virtual_time
async def test_reports_go_on_while_the_engine_hangs_and_say_so() -> None:
    async with World() as world:
        world.engine.hangs = True
        for _ in range(5):
            await asyncio.sleep(STEP_S / 4)
            world.hear("api", Heartbeat())
        report = world.wire.sent_to(LoadReport, "manager")[-1].load
        assert (report.step_s > STEP_S, report.hangs) == (True, True)
        assert not world.fatal
        world.engine.hangs = False
        await asyncio.sleep(2)
        report = world.wire.sent_to(LoadReport, "manager")[-1].load
        assert (report.step_s, report.hangs) == (0, False)


@in_virtual_time
async def test_remote_calls_are_answered() -> None:
    async with World() as world:
        world.engine.running |= {"b", "a"}
        assert (await world.call(CheckIntegrity())).result == []
        assert (await world.call(ListRequests("tcp://api/tokens"))).result == ["a", "b"]
        assert (await world.call(CallEngine("list_loras", ["x"]))).result == [1, 2, 3]
        assert world.engine.called("utility") == [["list_loras", "x"]]


@in_virtual_time
async def test_a_call_that_fails_in_the_engine_is_answered_with_its_error() -> None:
    async with World() as world:
        world.engine.fail["utility"] = ValueError("no such thing")
        answer = await world.call(CallEngine("anything", []))
        assert answer.error == "p0: ValueError: no such thing"
        assert await world.llumlet.check_integrity() == [], "an engine's error is no bug of a handler"


@in_virtual_time
async def test_a_call_that_fails_by_a_bug_shows_in_the_integrity_check() -> None:
    async with World() as world:
        world.engine.live_requests = None  # type: ignore[assignment,method-assign]
        answer = await world.call(ListRequests("tcp://api/tokens"))
        assert answer.error_class == "EngineDeadError"
        (problem,) = await world.llumlet.check_integrity()
        assert "serving ListRequests to api failed: TypeError" in problem
        assert world.fatal == []
