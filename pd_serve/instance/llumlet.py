"""The llumlet: one instance's local scheduler and migration coordinator, on the event loop.

It takes messages from API servers and other llumlets, hands requests to the engine, starts hand-offs on
the event of the first prefill step, and reports load.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from msgspec.structs import asdict

from migration.bounds import MigrationBounds
from migration.coordinator import MigrationCoordinator
from migration.engine_interface import Engine, EngineEvents
from migration.messages import InstanceId, MigrationMessage, RequestId
from migration.record import MigrationRecord
from migration.tasks import BackgroundTasks
from migration.transport.kv_transport import KvTransport
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    Call,
    Hello,
    Holdings,
    InstanceStats,
    LoadReport,
    MigrateRequest,
    MigrationEnded,
    MoveOut,
    PeerLost,
    Reply,
    SetDraining,
    SetRole,
    Subscribe,
    ToInstance,
)
from pd_serve.comm.wire import Wire
from pd_serve.errors import DestinationRefusedError, EngineDeadError, MigrationError, SourceGoneError
from pd_serve.instance.peers import Peers
from pd_serve.observe.process_stats import process_stats
from router.load import EngineLoad, InstanceLoad
from router.rescheduling.selection import RequestSelector

logger = logging.getLogger(__name__)

#: Least time between two load reports; between two that differ in blocks only; greatest time.
REPORT_INTERVAL_S = 0.02
PROGRESS_INTERVAL_S = 0.1
HEARTBEAT_S = 0.5

#: A change of these is reported at once; a change of other numbers with the next report.
REPORTED_ON_CHANGE = ("total_blocks", "running", "suspended", "waiting", "waiting_tokens", "reserved_blocks")

#: Least time between two reports of what only metrics need.
STATS_INTERVAL_S = 1.0

#: Nobody will come any more: an instance that outlives its owner ends itself when it was greeted so long ago.
ORPHAN_S = 120.0

#: How many requests' next owners are remembered, to pass aborts on.
MAX_FORWARDS = 10_000


class Llumlet:
    """Args: `engine` is started and stopped by the caller; `on_fatal` is told what must not happen."""

    def __init__(
        self,
        name: InstanceId,
        role: str,
        wire: Wire,
        transport: KvTransport,
        *,
        bounds: MigrationBounds | None = None,
        on_fatal: Any = None,
    ) -> None:
        self.name = name
        self.role = role
        self.draining = False
        self._drained_by_hand = False
        self.address = wire.listen(self._on_frames)
        self.events = EngineEvents(
            on_prefill_started=self._on_prefill_started,
            on_requests_ended=self._on_requests_ended,
            on_load=self._on_load,
            on_death=on_fatal or (lambda error: None),
        )
        self._wire = wire
        self._transport = transport
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks(on_fatal)
        self._on_fatal = on_fatal
        self._decode = wire.decoder(ToInstance)
        self._contacts = Peers(name, wire, self._on_peer_lost)
        self._handoffs: dict[RequestId, list[str]] = {}
        self._stranded: set[RequestId] = set()
        self._forwards: OrderedDict[RequestId, InstanceId] = OrderedDict()
        self._load = EngineLoad(block_tokens=1)  # until the engine reports
        self._requests_added = 0
        self._selector = RequestSelector()
        self._moves_decided = 0
        self._reported_at = 0.0
        self._stats_at = -STATS_INTERVAL_S
        self._report_due: asyncio.TimerHandle | None = None
        self.engine: Engine = None  # type: ignore[assignment]
        self.coordinator: MigrationCoordinator = None  # type: ignore[assignment]

    def start(self, engine: Engine) -> None:
        """Begins to serve with an engine that is ready."""
        self.engine = engine
        self._contacts.greeted_at = self._loop.time()
        self.coordinator = MigrationCoordinator(
            self.name,
            engine,
            self._transport,
            self._send_to_peer,
            bounds=self._bounds,
            on_ended=self._on_migration_ended,
            on_failure=self._on_fatal,
        )
        self._tasks.start(self._heartbeat())

    async def close(self) -> None:
        await self._tasks.cancel()
        if self.coordinator is not None:
            await self.coordinator.close()

    # ---- messages

    def _on_frames(self, frames: Sequence[bytes]) -> None:
        sender, message = frames[0].decode(), self._decode(frames[1])
        match message:
            case AddRequest():
                self._tasks.start(self._add(sender, message, [bytes(frame) for frame in frames[2:]]))
            case AbortRequests():
                self._tasks.start(self._abort(message))
            case MigrateRequest():
                self._tasks.start(self._migrate(sender, message))
            case MoveOut():
                self._tasks.start(self._move_out(message))
            case SetRole(role=role):
                self.role = role
                self._report()
            case SetDraining(draining=draining, by_hand=by_hand):
                if by_hand:
                    self._drained_by_hand = draining
                self.draining = draining or self._drained_by_hand
                self._report()
            case Subscribe(address=address):
                self._contacts.on_subscribe(sender, address)
                self._report()
            case Hello():
                self._contacts.on_hello(sender, message)
                self._report()
            case PeerLost(instance_id=instance_id):
                self._contacts.on_lost(instance_id)
            case Call():
                self._tasks.start(self._answer(sender, message))
            case _:
                self.coordinator.on_message(InstanceId(sender), message)

    def _on_peer_lost(self, instance_id: str) -> None:
        self.coordinator.peer_lost(InstanceId(instance_id))

    def _send_to_peer(self, peer: InstanceId, message: MigrationMessage) -> None:
        self._wire.send(peer, message)

    # ---- requests

    async def _add(self, sender: str, message: AddRequest, payload: list[bytes]) -> None:
        request_id = message.request_id
        logger.debug("request %s: is queued on %s", request_id, self.name)
        self._forwards.pop(request_id, None)
        if message.epoch:
            # Recomputed: an older copy, which nobody follows any more, may live here or be on its way here.
            await self.coordinator.drop_arriving(request_id)
            await self.engine.abort([request_id], message.epoch)
        if message.handoff is not None:
            self._handoffs[request_id] = message.handoff
        try:
            await self.engine.add(
                payload,
                message.client,
                epoch=message.epoch,
                output_token_ids=message.output_token_ids,
                handoff=message.handoff is not None,
            )
        except EngineDeadError:
            raise
        except Exception as error:
            # One bad request must not take the instance down; the client gets vLLM's internal error.
            logger.exception("request %s: the engine cannot take it", request_id)
            self._handoffs.pop(request_id, None)
            self._send_to_server(
                sender, Reply(call_id=f"add:{request_id}", error=f"{type(error).__name__}: {error}")
            )
        finally:
            # Not before the engine's load has it in it: a step may be long, and who reads a report meanwhile
            # would take the request for seen and its room for free.
            self._requests_added += 1

    async def _abort(self, message: AbortRequests) -> None:
        unknown = await self.engine.abort(message.request_ids, message.below_epoch)
        by_owner: dict[InstanceId, list[RequestId]] = {}
        for request_id in unknown:
            if (owner := self._forwards.pop(request_id, None)) is not None:
                by_owner.setdefault(owner, []).append(request_id)
        for owner, moved in by_owner.items():
            self._wire.send(owner, AbortRequests(moved, message.below_epoch))

    def _on_requests_ended(self, request_ids: list[RequestId]) -> None:
        self.coordinator.requests_ended(request_ids)
        for request_id in request_ids:
            self._forget(request_id)

    def _forget(self, request_id: RequestId) -> None:
        self._handoffs.pop(request_id, None)
        self._stranded.discard(request_id)

    # ---- migration

    def _on_prefill_started(self, request_ids: list[RequestId]) -> None:
        for request_id in request_ids:
            if (candidates := self._handoffs.pop(request_id, None)) is not None:
                self._tasks.start(self._hand_off(request_id, candidates))

    async def _hand_off(self, request_id: RequestId, candidates: list[str]) -> None:
        """Moves a request to the first candidate that takes it; else it decodes here until told where to."""
        for candidate in candidates:
            if not self._contacts.knows(candidate):
                continue  # stopped or dead since: an answer would never come
            try:
                record = await self.coordinator.migrate(request_id, InstanceId(candidate), "handoff")
            except SourceGoneError:
                return
            except DestinationRefusedError as error:
                code = error.refusal.code
                logger.info("request %s: stays on %s (%s): %s", request_id, self.name, code, error)
                break
            if record.committed:
                return
        self._stranded.add(request_id)  # first, so that its end while we ask takes it out again
        try:
            await self.engine.describe(request_id)  # still running here?
        except MigrationError:
            self._stranded.discard(request_id)
            return
        logger.info("request %s: no decode instance takes it, %s decodes it", request_id, self.name)
        self._report()

    async def _migrate(self, sender: str, message: MigrateRequest) -> None:
        request_id, destination = message.request_id, InstanceId(message.destination)
        try:
            record = await self.coordinator.migrate(
                request_id, destination, message.reason, blocking=message.blocking
            )
        except (SourceGoneError, DestinationRefusedError) as error:
            record = MigrationRecord(
                request_id=request_id,
                source=self.name,
                destination=destination,
                reason=message.reason,
                refusal=error.refusal,
            )
        else:
            if not message.call_id:  # the broadcast of the record is the answer
                return
        self._send_to_server(sender, MigrationEnded(message.call_id, record))

    async def _move_out(self, message: MoveOut) -> None:
        """Moves a request of its own choice, because the scheduler has found this instance too full."""
        destination = message.destination
        running = await self.engine.running_requests()
        requests = [r for r in running if not self.coordinator.is_leaving(r.request_id)]
        chosen = self._selector.select(message.selection, requests, self.load(), destination)
        self._moves_decided += 1
        self._report()
        if chosen is None:
            return
        try:
            await self.coordinator.migrate(
                chosen.request_id, InstanceId(destination.instance_id), message.reason
            )
        except MigrationError as error:
            logger.info(
                "request %s: %s did not happen (%s): %s",
                chosen.request_id,
                message.reason,
                error.refusal.code,
                error,
            )

    def _on_migration_ended(self, record: MigrationRecord) -> None:
        if record.refusal is None:
            self._forwards[record.request_id] = record.destination
            while len(self._forwards) > MAX_FORWARDS:
                self._forwards.popitem(last=False)
            self._forget(record.request_id)
            outcome = f"committed, {record.blocks} blocks in {record.stages} stages"
        else:
            outcome = f"did not happen ({record.refusal.code}): {record.why}"
        # A committed hand-off is routine: every request has one.
        level = logging.DEBUG if record.committed and record.reason == "handoff" else logging.INFO
        logger.log(
            level,
            "request %s: %s %s -> %s %s",
            record.request_id,
            record.reason,
            self.name,
            record.destination,
            outcome,
        )
        for server in self._contacts.servers:
            self._send_to_server(server, MigrationEnded("", record))
        self._report()

    # ---- calls

    async def _answer(self, sender: str, message: Call) -> None:
        value: Any = None
        error = None
        try:
            if message.method == "check_integrity":
                value = await self.check_integrity()
            elif message.method == "live_requests":
                value = await self.engine.live_requests(*message.arguments)
            elif message.method == "holdings":
                value = Holdings(await self.engine.held_blocks(), self.coordinator.leaving)
            else:
                value = await self.engine.utility(message.method, *message.arguments)
            if isinstance(value, set):
                value = sorted(value)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        self._send_to_server(sender, Reply(message.call_id, value, error))

    async def check_integrity(self) -> list[str]:
        """Everything on this instance that does not add up; see DESIGN section 7."""
        problems = await self.engine.check_integrity() + self.coordinator.check_integrity()
        if self._stranded or self._handoffs:
            waiting = sorted(self._stranded | set(self._handoffs))
            problems.append(f"requests wait for a hand-off: {waiting}")
        return [f"{self.name}: {problem}" for problem in problems]

    # ---- load

    def _on_load(self, load: EngineLoad) -> None:
        before, self._load = self._load, load
        changed = any(getattr(load, name) != getattr(before, name) for name in REPORTED_ON_CHANGE)
        if changed or self._loop.time() - self._reported_at >= PROGRESS_INTERVAL_S:
            self._report()

    def load(self) -> InstanceLoad:
        return InstanceLoad(
            instance_id=self.name,
            role=self.role,
            migrating_in=self.coordinator.num_incoming,
            migrating_out=self.coordinator.num_outgoing,
            draining=self.draining,
            requests_added=self._requests_added,
            moves_decided=self._moves_decided,
            **asdict(self._load),
        )

    def stats(self) -> InstanceStats:
        coordinator = self.coordinator
        return InstanceStats(
            process=process_stats(),
            offers=coordinator.num_offers,
            refused_offers=coordinator.num_refused,
            bytes_received=coordinator.bytes_received,
            protocol_errors=coordinator.protocol_errors,
        )

    def _report(self) -> None:
        """Reports as soon as the last report is old enough."""
        if self._report_due is None:
            delay = max(0.0, self._reported_at + REPORT_INTERVAL_S - self._loop.time())
            self._report_due = self._loop.call_later(delay, self._report_now)

    def _report_now(self) -> None:
        self._report_due = None
        self._reported_at = self._loop.time()
        if self.coordinator is None:
            return
        stats = None
        if self._reported_at - self._stats_at >= STATS_INTERVAL_S:
            self._stats_at, stats = self._reported_at, self.stats()
        report = LoadReport(self.load(), sorted(self._stranded), stats)
        for listener in self._contacts:
            self._wire.send(listener, report)

    def _send_to_server(self, server: str, message: LoadReport | MigrationEnded | Reply) -> None:
        self._wire.send(server, message)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._report()
            if self._loop.time() - self._contacts.greeted_at > ORPHAN_S:
                raise EngineDeadError(f"nobody has greeted {self.name} for {ORPHAN_S:.0f} s")
            for server in self._contacts.forget_silent():
                await self.engine.abort_client(server.token_endpoint)
