"""One instance's event loop, between a wire that keeps what is sent and an engine that does as it is told."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import pytest

from migration.bounds import MigrationBounds
from migration.engine_interface import Reservation, RunningRequest
from migration.errors import Refusal, RefusalCode
from migration.messages import (
    BlockRun,
    Committed,
    Final,
    FinalState,
    InstanceId,
    MigrationId,
    MigrationMessage,
    Offer,
    Pull,
    Refused,
    RequestDescription,
    RequestId,
    Withdraw,
)
from migration.record import MigrationRecord
from migration.transport.kv_transport import KvRegion
from migration.transport.local import LocalFabric
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    HandOff,
    Heartbeat,
    LoadReport,
    MigrationEnded,
    MoveOut,
    RequestFailed,
    SetDraining,
    SetRole,
)
from pd_serve.comm.requests import (
    AnyRequest,
    Call,
    CallEngine,
    CheckIntegrity,
    LiveRequests,
    MoveRequest,
)
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S, ORPHAN_S, REPORT_INTERVAL_S
from pd_serve.errors import DestinationRefusedError, EngineDeadError, SourceGoneError
from pd_serve.instance.llumlet import Llumlet
from router.load import EngineLoad, InstanceLoad
from router.plugins import PolicyChoice
from tests.members import membership
from tests.recording_wire import RecordingWire
from tests.unit.pd_serve.made_migrations import FULL
from tests.virtual_time import in_virtual_time

M = TypeVar("M")
R = RequestId("r")


class FakeEngine:
    """Requests without tokens. `calls` tells what was asked, in order.

    Attributes:
        running: Requests that can be described, and moved.
        priorities: Of those that have another one than 0.
        fail: Raised by the next call of that name.
        held: Calls of these names wait until the event is set.
    """

    def __init__(self) -> None:
        self.llumlet: Llumlet
        self.calls: list[tuple[Any, ...]] = []
        self.running: set[str] = set()
        self.priorities: dict[str, int] = {}
        self.fail: dict[str, Exception] = {}
        self.held: dict[str, asyncio.Event] = {}

    async def _visit(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if (event := self.held.get(name)) is not None:
            await event.wait()
        if (error := self.fail.pop(name, None)) is not None:
            raise error

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]  # type: ignore[misc]

    def end(self, request_id: str) -> None:
        self.running.discard(request_id)
        self.llumlet.events.on_requests_ended([RequestId(request_id)])

    async def add(self, payload: list[bytes], client: str, **options: Any) -> None:
        await self._visit("add", payload, client, options)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        await self._visit("abort", request_ids, below_epoch)
        known = [request_id for request_id in request_ids if request_id in self.running]
        for request_id in known:
            self.end(request_id)
        return [request_id for request_id in request_ids if request_id not in known]

    async def abort_client(self, client: str) -> None:
        await self._visit("abort_client", client)

    async def describe(self, request_id: RequestId) -> RequestDescription:
        await self._visit("describe", request_id)
        if request_id not in self.running:
            raise SourceGoneError(RefusalCode.NOT_RUNNING, "not running here")
        return RequestDescription(request_id, [b"payload"], "client", 0, 0, [1], 10, 100, {})

    async def next_stage(self, request_id: RequestId, *arguments: Any, suspend: bool) -> FinalState:
        await self._visit("next_stage", request_id)
        return FinalState(BlockRun(0, [1, 2]), 0, [1, 2, 3], 12)

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        await self._visit("resume", request_id, epoch)

    async def release(self, request_id: RequestId) -> None:
        await self._visit("release", request_id)
        self.running.discard(request_id)

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        await self._visit("reserve", migration_id)
        return Reservation([1, 2, 3], 0)

    async def drop(self, migration_id: MigrationId) -> None:
        await self._visit("drop", migration_id)

    async def running_requests(self) -> list[RunningRequest]:
        await self._visit("running_requests")
        return [
            RunningRequest(RequestId(request_id), self.priorities.get(request_id, 0), 10, float(rank))
            for rank, request_id in enumerate(sorted(self.running))
        ]

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        return [RequestId(request_id) for request_id in sorted(self.running)]

    async def utility(self, method: str, *arguments: Any) -> Any:
        await self._visit("utility", method, *arguments)
        return {3, 1, 2}

    async def check_integrity(self) -> list[str]:
        return []


class World:
    """The llumlet p0, an API server and two decode instances, all of them in the hands of the test."""

    def __init__(self, bounds: MigrationBounds | None = None) -> None:
        self.wire, self.engine = RecordingWire("p0"), FakeEngine()
        self.fatal: list[BaseException] = []
        transport = LocalFabric().transport("p0")
        transport.register([KvRegion(0, 8, 64)])
        self.llumlet = self.engine.llumlet = Llumlet(
            "p0",  # type: ignore[arg-type]
            "prefill",
            self.wire,
            transport,
            bounds=bounds,
            on_fatal=self.fatal.append,
        )
        self.llumlet.start(self.engine)  # type: ignore[arg-type]
        self.members("d0", "d1")

    async def __aenter__(self) -> "World":
        await self.settle()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.llumlet.close()

    async def settle(self) -> None:
        """Everything that is ready has happened, reports included."""
        await asyncio.sleep(REPORT_INTERVAL_S)
        for _ in range(20):
            await asyncio.sleep(0)

    def hear(self, sender: str, message: object, *payload: bytes) -> None:
        self.wire.hear(sender, message, *payload)

    def members(self, *peers: str, api_servers: Sequence[str] = ("api",), scheduler: str = "") -> None:
        """The manager tells the membership."""
        self.hear("manager", membership("p0", *peers, api_servers=api_servers, scheduler=scheduler))

    async def call(self, request: AnyRequest) -> Answer:
        """An API server calls, and gets the answer."""
        self.hear("api", Call("call", request))
        await self.settle()
        return self.sent(Answer, "api")[-1]

    def add(self, request_id: str = "r", handoff: Sequence[str] | None = None, epoch: int = 0) -> None:
        candidates = None if handoff is None else list(handoff)
        message = AddRequest(RequestId(request_id), "api/tokens", epoch, candidates, [])
        self.hear("api", message, b"one", b"two")

    async def start_prefill(self, request_id: str = "r") -> None:
        """The engine schedules the request's first step, after it has been added."""
        await self.settle()
        self.engine.running.add(request_id)
        self.llumlet.events.on_prefill_started([RequestId(request_id)])
        await self.settle()

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        return self.wire.sent_to(kind, to)

    def reports(self) -> list[LoadReport]:
        return self.sent(LoadReport, "api")

    async def answer(self, peer: str, make: Callable[[MigrationId], MigrationMessage]) -> None:
        """`peer` says something about the latest migration."""
        self.hear(peer, make(self.sent(Offer)[-1].migration_id))
        await self.settle()

    async def move(self, peer: str) -> None:
        """`peer` takes what it has been offered."""
        await self.answer(peer, lambda migration_id: Pull(migration_id, 0))
        assert self.sent(Final, peer)
        await self.answer(peer, Committed)


class TestRequests:
    @in_virtual_time
    async def test_are_added_as_they_came(self) -> None:
        async with World() as world:
            message = AddRequest(R, "api/tokens", 0, ["d0"], [])
            world.hear("api", message, b"one", b"two")
            await world.settle()
            options = {"epoch": 0, "output_token_ids": [], "handoff": True}
            assert world.engine.called("add") == [[[b"one", b"two"], "api/tokens", options]]
            assert not world.engine.called("abort")
            assert world.llumlet.reporter.load().requests_added == 1

    @in_virtual_time
    async def test_one_that_the_engine_cannot_take_is_answered(self) -> None:
        """It must not take the instance down, nor be waited for."""
        async with World() as world:
            world.engine.fail["add"] = ValueError("nonsense")
            world.add(handoff=["d0"])
            await world.settle()
            assert world.sent(RequestFailed, "api") == [RequestFailed(R, "ValueError: nonsense")]
            assert not world.fatal
            assert await world.llumlet.check_integrity() == []

    @in_virtual_time
    async def test_count_as_added_when_the_engine_has_them(self) -> None:
        """A report in between must not say of a request that its load is in it. One that fails counts too."""
        async with World() as world:
            world.engine.held["add"] = asyncio.Event()
            world.add()
            await asyncio.sleep(INSTANCE_HEARTBEAT_S)
            assert world.reports()[-1].load.requests_added == 0
            world.engine.fail["add"] = ValueError("nonsense")
            world.engine.held["add"].set()
            await asyncio.sleep(INSTANCE_HEARTBEAT_S)
            assert world.reports()[-1].load.requests_added == 1

    @in_virtual_time
    async def test_a_dead_engine_ends_the_instance(self) -> None:
        async with World() as world:
            world.engine.fail["add"] = EngineDeadError("gone")
            world.add()
            await world.settle()
            assert [type(error) for error in world.fatal] == [EngineDeadError]

    @in_virtual_time
    async def test_a_recompute_ends_an_older_copy_first(self) -> None:
        """It lives here from before, under a lower epoch; its end does not touch the new one."""
        async with World() as world:
            world.engine.running.add("r")
            world.add(handoff=["d0"], epoch=1000)
            await world.settle()
            assert [call[0] for call in world.engine.calls] == ["abort", "add"]
            assert world.engine.called("abort") == [[[R], 1000]]
            await world.start_prefill()
            assert len(world.sent(Offer, "d0")) == 1

    @in_virtual_time
    async def test_a_recompute_waits_for_the_end_of_an_arriving_copy(self) -> None:
        """Both would hold blocks under one id, and the drop of the one free those of the other."""
        async with World() as world:
            description = RequestDescription(R, [b"payload"], "client", 0, 0, [1], 10, 100, {})
            world.hear("d0", Offer(MigrationId("m"), "test", description, b""))
            await world.settle()
            assert world.sent(Pull, "d0")
            world.engine.held["drop"] = asyncio.Event()
            world.add(epoch=1000)
            await world.settle()
            assert world.engine.called("drop") == [["m"]]
            assert not world.engine.called("add")
            world.engine.held["drop"].set()
            await world.settle()
            assert len(world.engine.called("add")) == 1


class TestAborts:
    @in_virtual_time
    async def test_reach_the_engine(self) -> None:
        async with World() as world:
            world.engine.running.add("r")
            world.hear("api", AbortRequests([R], 7))
            await world.settle()
            assert world.engine.called("abort") == [[[R], 7]]
            assert not world.sent(AbortRequests)

    @in_virtual_time
    async def test_follow_a_request_that_has_left_once(self) -> None:
        async with World() as world:
            world.add(handoff=["d1"])
            await world.start_prefill()
            await world.move("d1")
            for _ in range(2):
                world.hear("api", AbortRequests([R, RequestId("unknown")], 7))
                await world.settle()
            assert world.sent(AbortRequests, "d1") == [AbortRequests([R], 7)]

    @in_virtual_time
    async def test_do_not_follow_to_where_it_came_back_from(self) -> None:
        """It was given to this instance anew: where it once went is nobody's business."""
        async with World() as world:
            world.add(handoff=["d1"])
            await world.start_prefill()
            await world.move("d1")
            world.add(epoch=1000)
            await world.settle()
            world.hear("api", AbortRequests([R]))
            await world.settle()
            assert not world.sent(AbortRequests)


class TestHandOff:
    @in_virtual_time
    async def test_begins_with_the_first_prefill_step(self) -> None:
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
    async def test_goes_through_the_candidates(self) -> None:
        """Then the request stays, and says so in the reports until it is moved."""
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
            # One word for each migration, though the last one was asked for.
            assert [ended.record.committed for ended in world.sent(MigrationEnded)] == [False, False, True]

    @in_virtual_time
    async def test_with_nobody_to_go_to_it_waits_for_one(self) -> None:
        """The decode pool was empty when the request came, and is not for ever."""
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
    async def test_of_a_request_that_stays(self) -> None:
        async with World() as world:
            world.add(handoff=None)
            await world.start_prefill()
            assert [options["handoff"] for _, _, options in world.engine.called("add")] == [False]
            assert world.reports()[-1].stranded == []

    @in_virtual_time
    async def test_a_stranded_request_that_ends_is_forgotten(self) -> None:
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
    async def test_one_that_ends_while_it_is_asked_about_is_not_stranded(self) -> None:
        """The answer "it runs" and the end of the request wait on the loop, the end is handled first."""
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
    async def test_beyond_the_limit_waits_its_turn(self) -> None:
        """Too many are leaving already: the request asks again by way of the reports."""
        async with World(MigrationBounds(max_outgoing=1)) as world:
            for request_id in ("r", "s"):
                world.add(request_id, handoff=["d1"])
                await world.start_prefill(request_id)
            assert len(world.sent(Offer)) == 1
            assert world.reports()[-1].stranded == ["s"]

    @pytest.mark.parametrize(
        "error",
        [
            SourceGoneError(RefusalCode.PREEMPTED, "preempted"),
            DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, "a request with an image cannot move"),
        ],
    )
    @in_virtual_time
    async def test_what_cannot_move_stays_without_a_word(self, error: Exception) -> None:
        async with World() as world:
            world.add(handoff=["d1"])
            await world.settle()
            world.engine.fail["describe"] = error
            world.llumlet.events.on_prefill_started([R])
            await world.settle()
            assert not world.sent(Offer)
            assert await world.llumlet.check_integrity() == []

    @in_virtual_time
    async def test_of_a_request_that_never_starts(self) -> None:
        async with World() as world:
            world.add(handoff=["d1"])
            await world.settle()
            world.engine.end("r")
            await world.start_prefill()
            assert not world.sent(Offer)


class TestMoveRequest:
    @in_virtual_time
    async def test_is_answered_with_the_cost_of_the_migration(self) -> None:
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
    async def test_of_a_request_that_does_not_run_here_is_an_error(self) -> None:
        async with World() as world:
            answer = await world.call(MoveRequest(R, InstanceId("d0")))
            assert answer.result.refusal == Refusal(RefusalCode.NOT_RUNNING, "not running here")

    @in_virtual_time
    async def test_to_the_instance_itself_is_refused(self) -> None:
        async with World() as world:
            world.engine.running.add("r")
            answer = await world.call(MoveRequest(R, InstanceId("p0")))
            assert answer.result.refusal == Refusal(RefusalCode.ALREADY_HERE, "the request is on p0 already")

    @in_virtual_time
    async def test_whose_destination_refuses_is_refused(self) -> None:
        async with World() as world:
            world.engine.running.add("r")
            world.hear("api", Call("call", MoveRequest(R, InstanceId("d0"))))
            await world.settle()
            await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
            (answer,) = world.sent(Answer, "api")
            assert answer.result.refusal == FULL.prefixed("refused")


class TestMembership:
    @in_virtual_time
    async def test_connects_the_instance_to_all_others(self) -> None:
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
    async def test_without_a_peer_ends_the_migrations_with_it(self) -> None:
        async with World() as world:
            world.add(handoff=["d1", "d0"])
            await world.start_prefill()
            world.members("d0")
            await world.settle()
            assert "d1" not in world.wire.peers
            assert [ended.record.why for ended in world.sent(MigrationEnded)] == ["d1 died"]
            assert len(world.sent(Offer, "d0")) == 1  # the next candidate

    @in_virtual_time
    async def test_of_an_earlier_manager_changes_nothing(self) -> None:
        async with World() as world:
            world.hear("manager", membership("p0", "d0", "d1", api_servers=["api"], term=2))
            world.hear("manager", membership("p0", term=1))
            await world.settle()
            assert {"d0", "d1", "api"} <= set(world.wire.peers)
            assert not world.engine.called("abort_client")

    @in_virtual_time
    async def test_without_an_api_server_ends_its_requests(self) -> None:
        async with World() as world:
            world.members("d0", "d1", api_servers=["other"])
            await world.settle()
            assert world.engine.called("abort_client") == [["tcp://api/tokens"]]
            assert "api" not in world.wire.peers
            assert "other" in world.wire.peers

    @in_virtual_time
    async def test_may_be_missing_as_long_as_an_api_server_is_heard(self) -> None:
        """The manager is absent; an instance that serves goes on."""
        async with World() as world:
            for _ in range(5):
                await asyncio.sleep(ORPHAN_S / 2)
                world.hear("api", Heartbeat())
            assert not world.fatal
            await asyncio.sleep(ORPHAN_S + 2 * INSTANCE_HEARTBEAT_S)
            assert [type(error) for error in world.fatal] == [EngineDeadError]


class TestCalls:
    @in_virtual_time
    async def test_are_answered(self) -> None:
        async with World() as world:
            world.engine.running |= {"b", "a"}
            assert (await world.call(CheckIntegrity())).result == []
            assert (await world.call(LiveRequests("tcp://api/tokens"))).result == ["a", "b"]
            assert (await world.call(CallEngine("list_loras", ["x"]))).result == [1, 2, 3]
            assert world.engine.called("utility") == [["list_loras", "x"]]

    @in_virtual_time
    async def test_that_the_engine_fails_are_answered_with_its_error(self) -> None:
        async with World() as world:
            world.engine.fail["utility"] = ValueError("no such thing")
            answer = await world.call(CallEngine("anything", []))
            assert answer.error == "p0: ValueError: no such thing"
            assert await world.llumlet.check_integrity() == [], "an engine's error is no bug of a handler"

    @in_virtual_time
    async def test_that_fail_by_a_bug_show_in_the_integrity(self) -> None:
        async with World() as world:
            world.engine.live_requests = None  # type: ignore[assignment,method-assign]
            answer = await world.call(LiveRequests("tcp://api/tokens"))
            assert answer.error_class == "EngineDeadError"
            (problem,) = await world.llumlet.check_integrity()
            assert "serving LiveRequests to api failed: TypeError" in problem
            assert world.fatal == []


class TestReports:
    @in_virtual_time
    async def test_follow_the_engine_but_not_faster_than_so(self) -> None:
        async with World() as world:
            before = len(world.reports())
            for free in range(100):
                load = EngineLoad(
                    total_blocks=100,
                    free_blocks=free,
                    running=7,
                    suspended=2,
                    waiting=4,
                    waiting_tokens=70,
                    head_of_line_blocks=6,
                )
                world.llumlet.events.on_load(load)
            await asyncio.sleep(2.5 * REPORT_INTERVAL_S)
            assert len(world.reports()) == before + 1
            reported = world.reports()[-1].load
            assert (reported.instance_id, reported.role) == ("p0", "prefill")
            assert (reported.total_blocks, reported.free_blocks) == (100, 99)
            assert [getattr(reported, name) for name in load.__struct_fields__] == [
                getattr(load, name) for name in load.__struct_fields__
            ]

    @in_virtual_time
    async def test_come_without_a_cause_too(self) -> None:
        async with World() as world:
            before = len(world.reports())
            await asyncio.sleep(3.5 * INSTANCE_HEARTBEAT_S)
            assert len(world.reports()) == before + 3

    @in_virtual_time
    async def test_count_migrations_under_way(self) -> None:
        async with World() as world:
            world.add(handoff=["d1"])
            await world.start_prefill()
            assert world.llumlet.reporter.load().migrating_out == 1
            description = RequestDescription(R, [b"payload"], "client", 0, 0, [1], 10, 100, {})
            world.hear("d0", Offer(MigrationId("m"), "test", description, b""))
            await world.settle()
            assert world.llumlet.reporter.load().migrating_in == 1
            world.hear("d0", Withdraw(MigrationId("m"), Refusal(RefusalCode.CANCELLED, "enough")))
            await world.settle()
            assert world.llumlet.reporter.load().migrating_in == 0


class TestScheduler:
    """What a scheduler says. Its loads and its choices are the router's."""

    @staticmethod
    def move_out(world: World, selection: str = "shortest", reason: str = "balance") -> None:
        destination = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=100)
        world.hear("scheduler", MoveOut(destination, reason, PolicyChoice(selection)))

    @in_virtual_time
    async def test_gets_every_report_as_soon_as_it_is_a_member(self) -> None:
        async with World() as world:
            world.members("d0", "d1", scheduler="tcp://scheduler")
            await world.settle()
            assert world.sent(LoadReport, "scheduler") == world.reports()[-1:]
            world.members("d0", "d1", scheduler="tcp://its-successor")
            assert world.wire.peers["scheduler"] == "tcp://its-successor"

    @in_virtual_time
    async def test_is_refused_a_move_by_a_policy_that_is_not_installed(self) -> None:
        async with World() as world:
            world.engine.running.add("r")
            self.move_out(world, "mine")
            await world.settle()
            assert not world.sent(Offer)
            assert world.llumlet.reporter.load().moves_decided == 1
            assert world.fatal == []

    @in_virtual_time
    async def test_cannot_end_an_instance_by_an_order_whose_handling_fails(self) -> None:
        async with World() as world:
            world.engine.fail["running_requests"] = KeyError("a bug")
            self.move_out(world)
            await world.settle()
            assert world.fatal == []
            assert "a background task failed" in (await world.llumlet.check_integrity())[0]

    @in_virtual_time
    async def test_has_a_request_moved_that_the_instance_chooses(self) -> None:
        async with World() as world:
            world.engine.running |= {"high", "normal"}
            world.engine.priorities["high"] = -1
            self.move_out(world)
            await world.settle()
            assert world.llumlet.reporter.load().moves_decided == 1
            assert world.reports()[-1].load.migrating_out == 1
            await world.move("d0")
            (ended,) = world.sent(MigrationEnded, "api")
            record = ended.record
            assert (record.request_id, record.destination, record.reason) == ("normal", "d0", "balance")
            assert record.committed

    @in_virtual_time
    async def test_has_each_request_moved_once(self) -> None:
        async with World() as world:
            world.engine.running |= {"a", "b"}
            for _ in range(3):
                self.move_out(world)
            await world.settle()
            assert {offer.request.request_id for offer in world.sent(Offer, "d0")} == {"a", "b"}
            assert world.llumlet.reporter.load().moves_decided == 3

    @in_virtual_time
    async def test_moves_even_high_priority_to_empty_an_instance(self) -> None:
        async with World() as world:
            world.engine.running.add("high")
            world.engine.priorities["high"] = -1
            self.move_out(world)
            await world.settle()
            assert not world.sent(Offer)
            self.move_out(world, "drain", "drain")
            await world.settle()
            assert len(world.sent(Offer, "d0")) == 1

    @in_virtual_time
    async def test_hears_of_a_move_that_did_not_happen_by_the_loads_only(self) -> None:
        async with World() as world:
            world.engine.running.add("r")
            self.move_out(world)
            await world.settle()
            await world.answer("d0", lambda migration_id: Refused(migration_id, FULL))
            assert world.llumlet.reporter.load().migrating_out == 0
            assert "r" in world.engine.running
            assert world.fatal == []

    @in_virtual_time
    async def test_changes_the_role(self) -> None:
        async with World() as world:
            world.hear("scheduler", SetRole("decode"))
            await world.settle()
            assert world.reports()[-1].load.role == "decode"

    @in_virtual_time
    async def test_drains_and_uses_again(self) -> None:
        async with World() as world:
            for draining in (True, False):
                world.hear("scheduler", SetDraining(draining))
                await world.settle()
                assert world.reports()[-1].load.draining is draining

    @in_virtual_time
    async def test_does_not_use_again_what_is_drained_by_the_operator(self) -> None:
        async with World() as world:
            world.hear("api", SetDraining(True, by_operator=True))
            world.hear("scheduler", SetDraining(False))
            await world.settle()
            assert world.reports()[-1].load.draining
            world.hear("api", SetDraining(False, by_operator=True))
            await world.settle()
            assert not world.reports()[-1].load.draining

    @in_virtual_time
    async def test_hand_offs_to_instances_that_were_stopped_are_not_tried(self) -> None:
        async with World() as world:
            world.add(handoff=["d7", "d1"])
            await world.start_prefill()
            assert not world.sent(Offer, "d7")
            assert len(world.sent(Offer, "d1")) == 1
