"""An llumlet between a recording wire and an engine stub."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, TypeVar

from migration.bounds import MigrationBounds
from migration.engine_interface import HeldByClient, RunningRequest, StepProgress
from migration.errors import RefusalCode
from migration.messages import (
    BlockRun,
    Committed,
    Final,
    FinalState,
    KvPart,
    MigrationId,
    MigrationMessage,
    Offer,
    Pull,
    RequestDescription,
    RequestId,
    stem_of,
)
from migration.prefix_store import PrefixQuery
from migration.reservation import Reservation
from migration.transport.kv_transport import KvRegion
from migration.transport.local import LocalFabric
from pd_serve.comm.messages import (
    AddRequest,
    LoadReport,
    RequestReport,
)
from pd_serve.comm.requests import (
    AnyRequest,
    Call,
)
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import FIRST_STEPS, REPORT_INTERVAL_S, STRANDED_CHECK_S
from pd_serve.errors import SourceGoneError
from pd_serve.instance.llumlet import Llumlet
from router.load import EngineLoad
from tests.members import membership
from tests.recording_wire import RecordingWire

M = TypeVar("M")
T = TypeVar("T")
R = RequestId("r")


class PrefixStoreStub:
    """A prefix cache that has room for everything."""

    def query(self, payload: list[bytes]) -> PrefixQuery:
        return PrefixQuery([b"hash"], 16, {})

    async def reserve(self, copy_id: MigrationId, query: PrefixQuery, part: KvPart) -> Reservation:
        return Reservation([[3]], [], 0)

    async def publish(self, copy_id: MigrationId) -> None: ...

    async def drop(self, copy_id: MigrationId) -> None: ...


def described(request_id: str) -> RequestDescription:
    return RequestDescription(RequestId(request_id), [b"payload"], "client", 0, 0, [1], 10, 100, {})


class EngineStub:
    """Requests without tokens. `calls` keeps the calls in order.

    Attributes:
        running: Requests that can be described, and moved.
        priorities: Of those that have another one than 0.
        fail: Raised by the next call of that name.
        always_fail: Raised by all calls of that name.
        hangs: It is in a step that does not end.
        held: Calls of these names wait until the event is set.
        held_by_client: What `visit_requests` shows.
    """

    def __init__(self) -> None:
        self.llumlet: Llumlet
        self.calls: list[tuple[Any, ...]] = []
        self.running: set[str] = set()
        self.priorities: dict[str, int] = {}
        self.fail: dict[str, Exception] = {}
        self.always_fail: dict[str, Exception] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.held_by_client: HeldByClient = {}
        self.hangs = False
        self.prefixes = PrefixStoreStub()

    async def _visit(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if (event := self.held.get(name)) is not None:
            await event.wait()
        if (error := self.fail.pop(name, self.always_fail.get(name))) is not None:
            raise error

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]  # type: ignore[misc]

    def end(self, request_id: str) -> None:
        self.running.discard(request_id)
        self.llumlet.events.on_requests_ended([RequestId(request_id)])

    @property
    def progress(self) -> StepProgress:
        return StepProgress(0, FIRST_STEPS, self.hangs)

    async def add(self, payload: list[bytes], client: str, **options: Any) -> bool:
        await self._visit("add", payload, client, options)
        return True

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
            raise SourceGoneError(RefusalCode.NOT_HERE, "not here")
        return described(request_id)

    async def next_stage(self, request_id: RequestId, *arguments: Any, **options: Any) -> FinalState:
        await self._visit("next_stage", request_id)
        return FinalState(KvPart(12, [BlockRun(0, [1, 2])]), 0, [1, 2, 3], 12)

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        await self._visit("resume", request_id, epoch)

    async def release(self, request_id: RequestId) -> None:
        await self._visit("release", request_id)
        self.running.discard(request_id)

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        await self._visit("reserve", migration_id)
        return Reservation([[1, 2, 3]], [], 0)

    async def unpin(self, reader: MigrationId) -> None:
        await self._visit("unpin", reader)

    async def publish(self, migration_id: MigrationId) -> None:
        await self._visit("publish", migration_id)

    async def drop(self, migration_id: MigrationId) -> None:
        await self._visit("drop", migration_id)

    async def running_requests(self) -> list[RunningRequest]:
        await self._visit("running_requests")
        return [
            RunningRequest(RequestId(request_id), self.priorities.get(request_id, 0), 10, float(rank))
            for rank, request_id in enumerate(sorted(self.running))
        ]

    async def visit_requests(self, visit: Callable[[HeldByClient], T]) -> T:
        await self._visit("visit_requests")
        return visit(self.held_by_client)

    async def resend(self, asked: list[tuple[RequestId, int]]) -> None:
        await self._visit("resend", asked)

    async def clients_of(self, stem: str) -> set[str]:
        await self._visit("clients_of", stem)
        return {client for client, held in self.held_by_client.items() for h in held if stem_of(h[0]) == stem}

    async def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> bool:
        await self._visit("adopt", request_id, payload, client, set(living))
        return bool(await self.clients_of(stem_of(request_id)) - set(living))

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        return [RequestId(request_id) for request_id in sorted(self.running)]

    async def utility(self, method: str, *arguments: Any) -> Any:
        await self._visit("utility", method, *arguments)
        return {3, 1, 2}

    async def check_integrity(self, under_way: Collection[MigrationId] = ()) -> list[str]:
        return []


class Publisher:
    """Keeps the reports of requests.

    Attributes:
        retained: Clients of the last `retain`.
    """

    def __init__(self) -> None:
        self.reports: list[tuple[str, RequestReport]] = []
        self.retained: set[str] = set()

    def report(self, client: str, report: RequestReport) -> None:
        self.reports.append((client, report))

    def retain(self, clients: Collection[str]) -> None:
        self.retained = set(clients)


class World:
    """The llumlet p0. A test plays the manager, an API server and two decode instances."""

    def __init__(self, bounds: MigrationBounds | None = None, orphan_s: float = 0.0) -> None:
        self.wire, self.engine, self.publisher = RecordingWire("p0"), EngineStub(), Publisher()
        self.fatal: list[BaseException] = []
        transport = LocalFabric().transport("p0")
        transport.register([KvRegion(0, 8, 64)])
        self.llumlet = self.engine.llumlet = Llumlet(
            "p0",  # type: ignore[arg-type]
            "prefill",
            self.wire,
            self.publisher,
            bounds=bounds,
            orphan_s=orphan_s,
            on_fatal=self.fatal.append,
        )
        self.llumlet.start(self.engine, transport)  # type: ignore[arg-type]
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
        self.hear("api", Call(f"call-{len(self.sent(Answer))}", request))
        await self.settle()
        return self.sent(Answer, "api")[-1]

    def add(
        self,
        request_id: str = "r",
        handoff: Sequence[str] | None = None,
        epoch: int = 0,
        prefix_from: str | None = None,
    ) -> None:
        candidates = None if handoff is None else list(handoff)
        message = AddRequest(RequestId(request_id), "api/tokens", epoch, candidates, [], prefix_from)
        self.hear("api", message, b"one", b"two")

    async def start_prefill(self, request_id: str = "r") -> None:
        """The engine schedules the request's first step, after it has been added."""
        await self.settle()
        self.engine.running.add(request_id)
        self.llumlet.events.on_prefill_started([described(request_id)])
        await self.step()

    async def step(self) -> None:
        """The engine makes a step, and stranded requests are found."""
        load = EngineLoad(block_tokens=16, total_blocks=100, running=len(self.engine.running))
        self.llumlet.events.on_load(load)
        await self.settle()
        await asyncio.sleep(STRANDED_CHECK_S)
        await self.settle()

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        return self.wire.sent_to(kind, to)

    def reports(self) -> list[LoadReport]:
        return self.sent(LoadReport, "api")

    async def answer(self, peer: str, make: Callable[[MigrationId], MigrationMessage]) -> None:
        """`peer` says something about the latest migration."""
        self.hear(peer, make(self.sent(Offer)[-1].migration_id))
        await self.settle()
        await asyncio.sleep(STRANDED_CHECK_S)
        await self.settle()

    async def move(self, peer: str) -> None:
        """`peer` takes what it has been offered."""
        await self.answer(peer, lambda migration_id: Pull(migration_id, 0))
        assert self.sent(Final, peer)
        await self.answer(peer, Committed)
