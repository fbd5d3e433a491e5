"""The llumlet: one instance's local scheduler and migration coordinator, on the event loop.

It receives the messages of API servers, the scheduler, the manager and other llumlets, and passes each to the
engine, the hand-offs, the ordered moves, the load reporter or the migration coordinator.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from migration.bounds import MigrationBounds
from migration.coordinator import MigrationCoordinator
from migration.engine_interface import Engine, EngineEvents
from migration.errors import DestinationRefusedError, EngineDeadError, PdServeError, RefusalCode
from migration.messages import AnyMigrationMessage, InstanceId, MigrationMessage, Offer, RequestId
from migration.prefix_messages import AnyPrefixMessage, PrefixMessage
from migration.record import MigrationRecord
from migration.tasks import BackgroundTasks
from migration.transport.kv_transport import KvTransport
from pd_serve.comm.cached_blocks import FollowCachedBlocks
from pd_serve.comm.leases import OrphanTimer
from pd_serve.comm.membership import Membership, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    HandOff,
    Heartbeat,
    MoveOut,
    RequestFailed,
    ResendTokens,
    SetDraining,
    SetRole,
    ToInstance,
)
from pd_serve.comm.requests import (
    Adopt,
    Call,
    CallEngine,
    CheckIntegrity,
    FindOrphan,
    Holdings,
    ListHoldings,
    ListRequests,
    MoveRequest,
)
from pd_serve.comm.rpc import RpcServer
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S
from pd_serve.instance.cached_blocks import CachedBlockReporter
from pd_serve.instance.handoffs import Handoffs
from pd_serve.instance.load_reporter import LoadReporter
from pd_serve.instance.moves import Moves
from pd_serve.instance.orphans import Orphans
from pd_serve.instance.prefix_waiters import PrefixWaiters
from pd_serve.instance.request_reporter import ReportPublisher, RequestReporter
from router.load import EngineLoad

logger = logging.getLogger(__name__)

#: Maximum number of moved requests whose destinations are kept, to forward aborts.
MAX_FORWARDS = 10_000


class Llumlet:
    """The llumlet of an instance. Runs on one event loop until `close`.

    Args:
        publisher: Sends the reports of requests.
        orphan_s: Seconds that requests go on after their API server has left; 0 ends them at once.
        itl_target_s: See `LoadReporter`.
        on_fatal: Called on an unexpected failure of the engine or of a migration, after which the state of
            the instance may be wrong. It has to end the process.
    """

    def __init__(
        self,
        name: InstanceId,
        role: str,
        wire: MessageWire,
        publisher: ReportPublisher,
        *,
        bounds: MigrationBounds | None = None,
        orphan_s: float = 0.0,
        itl_target_s: float = 0.0,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.name = name
        self._wire = wire
        self._bounds = bounds
        self._on_fatal = on_fatal
        self._tasks = BackgroundTasks(on_fatal)
        self._members = MembershipView(name, wire)
        self._orphan_s = orphan_s
        self._requests = RequestReporter(self._members, publisher, self._tasks, orphan_s)
        self._orphans = Orphans(self._members)
        self._cached_blocks = CachedBlockReporter(wire, self._members)
        self.reporter = LoadReporter(
            name,
            role,
            wire,
            self._members,
            lambda: self.handoffs.stranded,
            lambda: self._requests.number,
            self._cached_blocks,
            lambda: (self._orphans.num_adopted, self._requests.num_orphans_ended),
            itl_target_s,
        )
        self.handoffs = Handoffs(name, self._members, self.reporter, self._tasks)
        self._moves = Moves(name, wire, self._members, self.reporter)
        self._forwards: OrderedDict[RequestId, InstanceId] = OrderedDict()
        self._waiters: PrefixWaiters
        self._orphan_timer = OrphanTimer(name)
        self.engine: Engine
        self.coordinator: MigrationCoordinator | None = None
        self.events = EngineEvents(
            on_prefill_started=self.handoffs.on_prefill_started,
            on_requests_ended=self._on_requests_ended,
            on_load=self._on_engine_load,
            on_death=on_fatal or (lambda error: None),
            on_unmovable=self.reporter.on_unmovable,
        )
        self._calls = RpcServer(
            wire,
            {
                CheckIntegrity: self._serve_integrity,
                ListRequests: self._live_requests,
                ListHoldings: self._holdings,
                CallEngine: self._call_engine,
                MoveRequest: self._moves.move,
                FindOrphan: self._orphans.find,
                Adopt: self._orphans.adopt,
            },
        )
        self.address = wire.listen(ToInstance, self._on_message)

    def start(self, engine: Engine, transport: KvTransport) -> None:
        """Begins to serve with an engine that is ready, and the transport of its memory."""
        self.engine = engine
        self.coordinator = MigrationCoordinator(
            self.name,
            engine,
            transport,
            self._send_to_peer,
            bounds=self._bounds,
            is_far=self._members.is_far,
            on_ended=self._on_migration_ended,
            on_failure=self._on_fatal,
        )
        self._waiters = PrefixWaiters(self.coordinator.prefixes.reader)
        self._orphans.start(engine)
        for part in (self.handoffs, self._moves):
            part.start(engine, self.coordinator)
        self.reporter.start(self.coordinator)
        self._cached_blocks.start(engine, self.address)
        self._tasks.start(self._heartbeat())
        self._tasks.start(self._cached_blocks.run())

    async def close(self) -> None:
        self.reporter.close()
        await self._calls.close()
        await self._moves.close()
        await self._tasks.cancel()
        if self.coordinator is not None:
            await self.coordinator.close()

    # ---- messages

    def _on_message(self, sender: str, message: Any, payload: Sequence[bytes]) -> None:
        if self.coordinator is None:
            return  # the engine is loading, and the membership does not have this instance yet
        self._orphans.on_message()
        match message:
            case AddRequest():
                self._orphans.note(message.request_id)
                if self._requests.adding(message):
                    self._tasks.start(self._add(sender, message, [bytes(frame) for frame in payload]))
            case AbortRequests():
                self._tasks.start(self._abort(message))
            case ResendTokens(requests=asked):
                self._tasks.start(self.engine.resend(asked))
            case FollowCachedBlocks():
                self._cached_blocks.on_asked(sender)
            case HandOff(request_id=request_id, destination=destination):
                self.handoffs.hand_off(request_id, [destination])
            case MoveOut():
                self._moves.on_order(message)
            case SetRole(role=role):
                self.reporter.set_role(role)
            case SetDraining(draining=draining, by_operator=by_operator):
                self.reporter.set_draining(draining, by_operator=by_operator)
            case Heartbeat(number=number):
                self._orphan_timer.on_message()
                self._requests.on_heartbeat(sender, number)
                self._orphans.on_heartbeat(sender, number)
            case Membership():
                self._on_membership(message)
            case Call(call_id=call_id, request=request):
                self._calls.on_call(sender, call_id, request)
            case _ if isinstance(message, AnyMigrationMessage | AnyPrefixMessage):
                if isinstance(message, Offer):
                    self._orphans.note(message.request.request_id)
                self.coordinator.on_message(InstanceId(sender), message)
            case _:
                raise TypeError(f"an instance takes no {type(message).__name__}")

    def _on_membership(self, message: Membership) -> None:
        assert self.coordinator is not None
        change = self._members.update(message)
        if change is None:
            return
        self._orphan_timer.on_message()
        for instance_id in change.left:
            logger.debug("%s: %s is gone", self.name, instance_id)
            self.coordinator.peer_lost(InstanceId(instance_id))
        for api_server, info in change.api_servers_left.items():
            end = f"its requests end after {self._orphan_s:g} s"
            logger.warning("%s: API server %s is gone, %s", self.name, api_server, end)
            self._requests.client_left(info.token_endpoint)
            self._cached_blocks.reader_left(api_server)
            if not self._orphan_s:
                self._tasks.start(self.engine.abort_client(info.token_endpoint))
        self._orphans.on_membership(change.api_servers_left)
        self.reporter.report_soon()

    def _send_to_peer(self, peer: InstanceId, message: MigrationMessage | PrefixMessage) -> None:
        self._wire.send(peer, message)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(INSTANCE_HEARTBEAT_S)
            self.reporter.step_watch.on_heartbeat(INSTANCE_HEARTBEAT_S, self.engine.progress)
            self.reporter.report_soon()
            self._requests.report_soon(self.engine)
            self._orphan_timer.on_heartbeat(INSTANCE_HEARTBEAT_S)

    def _on_engine_load(self, load: EngineLoad) -> None:
        self.reporter.on_engine_load(load)
        self.handoffs.on_engine_load(load)

    # ---- requests

    async def _add(self, sender: str, message: AddRequest, payload: list[bytes]) -> None:
        assert self.coordinator is not None
        request_id = message.request_id
        logger.debug("request %s: is queued on %s", request_id, self.name)
        self._forwards.pop(request_id, None)
        if message.epoch:
            # A recompute. The end of an older copy must not end the hand-off of this one.
            self._waiters.end(request_id, message.epoch)
            await self.engine.abort([request_id], message.epoch)
        if message.handoff is not None:
            self.handoffs.expect(request_id, message.handoff)
        try:
            if not await self._waiters.copy(message, payload):
                self.handoffs.forget(request_id)
            elif not await self.engine.add(
                payload,
                message.client,
                epoch=message.epoch,
                output_token_ids=message.output_token_ids,
                handoff=message.handoff is not None,
            ):
                logger.warning("request %s: is on %s already, under a later epoch", request_id, self.name)
        except EngineDeadError:
            raise
        except Exception as error:
            # One bad request must not end the instance. The client gets vLLM's internal error.
            logger.exception("request %s: the engine cannot take it", request_id)
            self.handoffs.forget(request_id)
            refusal = error.refusal if isinstance(error, DestinationRefusedError) else None
            if is_invalid := refusal is not None and refusal.code is RefusalCode.GRAMMAR:
                why = str(error)
            else:
                why = f"{type(error).__name__}: {error}"
            self._wire.send(sender, RequestFailed(request_id, why, is_invalid))
        finally:
            # Counted only when the engine has the request. A report during a long step would otherwise count
            # it as arrived and its blocks as free, as one before the engine's next load still does.
            self.reporter.requests_added += 1
            self._requests.added(message)

    async def _abort(self, message: AbortRequests) -> None:
        """Aborts requests here, and forwards the abort for requests that have moved."""
        for request_id in message.request_ids:
            self._waiters.end(request_id, message.below_epoch)
        unknown = await self.engine.abort(message.request_ids, message.below_epoch)
        by_destination: dict[InstanceId, list[RequestId]] = {}
        for request_id in unknown:
            if (destination := self._forwards.pop(request_id, None)) is not None:
                by_destination.setdefault(destination, []).append(request_id)
        for destination, moved in by_destination.items():
            self._wire.send(destination, AbortRequests(moved, message.below_epoch))

    def _on_requests_ended(self, request_ids: list[RequestId]) -> None:
        assert self.coordinator is not None
        self.coordinator.requests_ended(request_ids)
        for request_id in request_ids:
            self.handoffs.forget(request_id)

    def _on_migration_ended(self, record: MigrationRecord) -> None:
        if record.committed:
            self._forwards[record.request_id] = record.destination
            while len(self._forwards) > MAX_FORWARDS:
                self._forwards.popitem(last=False)
            self.handoffs.forget(record.request_id)
        self._moves.on_ended(record)

    # ---- calls

    async def check_integrity(self) -> list[str]:
        """Every violated invariant on this instance: blocks, migrations, hand-offs, message handlers."""
        assert self.coordinator is not None
        problems = await self.engine.check_integrity() + self.coordinator.check_integrity()
        if waiting := self.handoffs.unfinished:
            problems.append(f"requests wait for a hand-off: {waiting}")
        return [f"{self.name}: {problem}" for problem in problems] + self._wire.failures.problems()

    async def _serve_integrity(self, sender: str, request: CheckIntegrity) -> list[str]:
        if request.at_rest:
            return await self.check_integrity()
        assert self.coordinator is not None
        problems = await self.engine.check_integrity(self.coordinator.under_way)
        return [f"{self.name}: {problem}" for problem in problems]

    async def _live_requests(self, sender: str, request: ListRequests) -> list[RequestId]:
        return await self.engine.live_requests(request.token_endpoint)

    async def _holdings(self, sender: str, request: ListHoldings) -> Holdings:
        assert self.coordinator is not None
        return Holdings(await self.engine.held_blocks(), self.coordinator.leaving)

    async def _call_engine(self, sender: str, request: CallEngine) -> Any:
        try:
            value = await self.engine.utility(request.method, *request.arguments)
        except EngineDeadError:
            raise
        except Exception as error:
            raise PdServeError(f"{self.name}: {type(error).__name__}: {error}") from error
        return sorted(value) if isinstance(value, set) else value
