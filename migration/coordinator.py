"""The migrations of one instance: starts them, routes messages to them, bounds and counts them."""

import asyncio
import itertools
import logging
import uuid
from collections import deque
from collections.abc import Callable

from migration.bounds import MigrationBounds
from migration.destination_table import DestinationEvent, DestinationState
from migration.engine_interface import Engine
from migration.errors import DestinationRefusedError, ProtocolError, Refusal, RefusalCode
from migration.incoming import IncomingMigration
from migration.local_instance import LocalInstance, Pacer
from migration.messages import (
    AnyMigrationMessage,
    Committed,
    Confirmed,
    Dropped,
    InstanceId,
    MigrationId,
    MigrationMessage,
    Offer,
    Pull,
    Refused,
    RequestDescription,
    RequestId,
    ToDestination,
    ToSource,
    Withdraw,
)
from migration.outgoing import OutgoingMigration
from migration.prefix_copies import PrefixCopies
from migration.prefix_messages import AnyPrefixMessage, PrefixMessage
from migration.record import MigrationRecord
from migration.source_table import SourceEvent, SourceState
from migration.tasks import BackgroundTasks
from migration.transport.kv_transport import KvTransport
from migration.withdrawal import Withdrawal

logger = logging.getLogger(__name__)


class MigrationCoordinator:
    """Both sides of all migrations of one instance. Belongs to one event loop.

    Args:
        name: This instance.
        send: Sends a message to a peer; must not block, and may lose the message.
        on_ended: Called once per outgoing migration when it has ended.
        on_failure: Called with the exception of a failed engine call; the instance must not be used any more.

    Attributes:
        num_offers, num_refused: Offers received from peers, and those of them that were refused.
        protocol_errors: Messages that the state tables do not allow.
        prefixes: Copies of prefixes from and to other instances.
    """

    def __init__(
        self,
        name: InstanceId,
        engine: Engine,
        transport: KvTransport,
        send: Callable[[InstanceId, MigrationMessage | PrefixMessage], None],
        *,
        bounds: MigrationBounds | None = None,
        is_far: Callable[[InstanceId], bool] = lambda peer: False,
        on_ended: Callable[[MigrationRecord], None] = lambda record: None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.name = name
        self.bounds = bounds or MigrationBounds()
        pacer, tasks = Pacer(self.bounds.stage_bytes_per_s), BackgroundTasks(on_failure)
        self._instance = LocalInstance(name, engine, transport, send, self.bounds, pacer, tasks, is_far)
        self.prefixes = PrefixCopies(self._instance)
        self._on_ended = on_ended
        self._serial = itertools.count()
        self._incarnation = uuid.uuid4().hex[:8]  # ids from before a restart must not match
        self._outgoing: dict[MigrationId, OutgoingMigration] = {}
        self._by_request: dict[RequestId, OutgoingMigration] = {}
        self._starting: set[RequestId] = set()
        self._withdrawals: dict[MigrationId, Withdrawal] = {}
        self._given_up: deque[MigrationId] = deque(maxlen=1024)
        self._incoming: dict[MigrationId, IncomingMigration] = {}
        self._closed = False
        self.num_offers = self.num_refused = self.protocol_errors = 0
        self._bytes_received = 0  # by migrations that have ended

    @property
    def num_outgoing(self) -> int:
        return len(self._outgoing) + len(self._starting)

    def is_leaving(self, request_id: RequestId) -> bool:
        return request_id in self._by_request or request_id in self._starting

    @property
    def leaving(self) -> list[tuple[RequestId, InstanceId, str]]:
        """Migrations under way from here: request, destination, reason."""
        return [(m.description.request_id, m.destination, m.reason) for m in self._outgoing.values()]

    @property
    def num_incoming(self) -> int:
        return sum(migration.holds_resources for migration in self._incoming.values())

    @property
    def bytes_received(self) -> int:
        """KV copied to this instance, aborted migrations and prefixes included."""
        migrating = sum(m.bytes_copied for m in self._incoming.values())
        return self._bytes_received + migrating + self.prefixes.reader.bytes_copied

    @property
    def block_copy_s(self) -> float:
        """Time for each KV block in the latest copies on this machine, in seconds; 0 until there was one."""
        return self._instance.reads.block_s

    @property
    def far_block_copy_s(self) -> float:
        """The same of the latest copies from other machines."""
        return self._instance.far_reads.block_s

    async def migrate(
        self,
        request_id: RequestId,
        destination: InstanceId,
        reason: str,
        *,
        blocking: bool = False,
        description: RequestDescription | None = None,
    ) -> MigrationRecord:
        """Moves a running request to `destination` and returns when the migration has ended.

        Args:
            blocking: Stop-and-copy instead of live, for comparison.
            description: Of the request as it is, if that is known. It is offered at once then; otherwise the
                engine is asked, which answers between two steps.

        Raises:
            SourceGoneError: The request is not running here.
            DestinationRefusedError: It is being migrated already, cannot move, or too many migrations leave.
        """
        if destination == self.name:
            text = f"the request is on {destination} already"
            raise DestinationRefusedError(RefusalCode.ALREADY_HERE, text)
        if self.is_leaving(request_id):
            text = "the request is being migrated already"
            raise DestinationRefusedError(RefusalCode.ALREADY_MIGRATING, text)
        if self.num_outgoing >= self.bounds.max_outgoing:
            text = f"{self.bounds.max_outgoing} migrations are leaving already"
            raise DestinationRefusedError(RefusalCode.TOO_MANY_MIGRATIONS, text)
        if description is None:
            self._starting.add(request_id)
            try:
                description = await self._instance.engine.describe(request_id)
            finally:
                self._starting.discard(request_id)
        if self._closed:
            raise DestinationRefusedError(RefusalCode.STOPPING, "the instance is stopping")
        migration = OutgoingMigration(
            MigrationId(f"{self.name}.{self._incarnation}.{next(self._serial)}"),
            description,
            destination,
            reason,
            instance=self._instance,
            on_close=self._outgoing_closed,
            blocking=blocking,
        )
        self._outgoing[migration.migration_id] = migration
        self._by_request[request_id] = migration
        return await asyncio.shield(migration.ended)  # it goes on if the caller stops waiting

    def on_message(self, peer: InstanceId, message: AnyMigrationMessage | AnyPrefixMessage) -> None:
        """Takes a message from a peer. One that is not allowed is logged and changes nothing."""
        if self._closed:
            return
        if isinstance(message, AnyPrefixMessage):
            return self.prefixes.on_message(peer, message)
        try:
            if isinstance(message, ToSource):
                self._on_message_to_source(peer, message)
            else:
                self._on_message_to_destination(peer, message)
        except ProtocolError as error:
            self.protocol_errors += 1
            logger.warning(
                "migration %s: %s from %s: %s", message.migration_id, type(message).__name__, peer, error
            )

    def requests_ended(self, request_ids: list[RequestId]) -> None:
        """The engine has finished or aborted these requests."""
        for request_id in request_ids:
            if (migration := self._by_request.get(request_id)) is not None:
                refusal = Refusal(RefusalCode.FINISHED, "the request ended at its source")
                migration.on_event(SourceEvent.GONE, refusal)

    def cancel(self, request_id: RequestId, why: str) -> None:
        """Stops moving a request, if it is being moved and still can be stopped."""
        if (migration := self._by_request.get(request_id)) is not None:
            migration.on_event(SourceEvent.CANCELLED, Refusal(RefusalCode.CANCELLED, why))

    def peer_lost(self, peer: InstanceId) -> None:
        """A peer is known to be dead (not merely silent)."""
        self._instance.transport.forget(peer)
        self.prefixes.peer_lost(peer)
        refusal = Refusal(RefusalCode.PEER_LOST, f"{peer} died")
        for outgoing in list(self._outgoing.values()):
            if outgoing.destination == peer:
                outgoing.on_event(SourceEvent.PEER_LOST, refusal)
        for withdrawal in list(self._withdrawals.values()):
            if withdrawal.destination == peer:
                withdrawal.end()
        for incoming in list(self._incoming.values()):
            if incoming.source == peer:
                incoming.on_event(DestinationEvent.PEER_LOST, refusal)

    async def close(self) -> None:
        """Stops all migrations where they are; the peers notice by their bounds."""
        self._closed = True
        self.prefixes.close()
        for outgoing in self._outgoing.values():
            outgoing.close()
        for incoming in self._incoming.values():
            incoming.close()
        for withdrawal in self._withdrawals.values():
            withdrawal.close()
        self._outgoing.clear()
        self._withdrawals.clear()
        self._by_request.clear()
        self._incoming.clear()
        await self._instance.tasks.cancel()

    @property
    def under_way(self) -> set[MigrationId]:
        """Migrations from here and copies of prefixes: the engine holds blocks for them."""
        return {*self._outgoing, *self._withdrawals, *self.prefixes.under_way}

    def check_integrity(self) -> list[str]:
        """Migrations that still hold something; empty when the instance is at rest."""
        held = [
            f"{m.migration_id} of {m.request_id} is still leaving: {m.state_machine.history_text()}"
            for m in self._outgoing.values()
        ]
        held += [
            f"{m.migration_id} of {m.request_id} is still arriving: {m.state_machine.history_text()}"
            for m in self._incoming.values()
            if m.holds_resources
        ]
        held += [f"{migration_id} is withdrawn and not answered" for migration_id in self._withdrawals]
        if self._starting:
            held.append(f"still starting to move {sorted(self._starting)}")
        return held + self.prefixes.check_integrity() + self._instance.transport.quarantine.problems()

    def _on_message_to_source(self, peer: InstanceId, message: ToSource) -> None:
        migration = self._outgoing.get(message.migration_id)
        if migration is not None:
            if peer != migration.destination:
                raise ProtocolError(f"{peer} has no part in this migration")
            migration.on_message(message)
        elif (withdrawal := self._withdrawals.get(message.migration_id)) is not None:
            withdrawal.on_message(message)
        elif isinstance(message, Pull | Committed) and message.migration_id in self._given_up:
            # An unknown migration gets no answer: the message may be a late one about a request that runs
            # at the peer. A reservation ends with its lease, and API servers end copies that are stale.
            refusal = Refusal(RefusalCode.CANCELLED, "the source has given this migration up")
            self._instance.send(peer, Withdraw(message.migration_id, refusal))

    def _on_message_to_destination(self, peer: InstanceId, message: ToDestination) -> None:
        migration = self._incoming.get(message.migration_id)
        if migration is not None:
            if peer != migration.source:
                raise ProtocolError(f"{peer} has no part in this migration")
            migration.on_message(message)
        elif isinstance(message, Offer):
            self.num_offers += 1
            if self.num_incoming >= self.bounds.max_incoming:
                text = f"{self.bounds.max_incoming} migrations are arriving already"
                refusal = Refusal(RefusalCode.TOO_MANY_MIGRATIONS, text)
                self._instance.send(peer, Refused(message.migration_id, refusal))
                self.num_refused += 1
                return
            migration = IncomingMigration(message, peer, self._instance, self._incoming_closed)
            self._incoming[message.migration_id] = migration
        elif not isinstance(message, Confirmed):
            refusal = Refusal(RefusalCode.UNKNOWN_MIGRATION, "unknown here")
            self._instance.send(peer, Dropped(message.migration_id, refusal))

    def _outgoing_closed(self, migration: OutgoingMigration) -> None:
        if self._by_request.get(migration.request_id) is migration:
            del self._by_request[migration.request_id]
        self._outgoing.pop(migration.migration_id, None)
        if migration.state_machine.state is SourceState.ABORTED:
            self._given_up.append(migration.migration_id)
            self._withdraw(migration)
        self._on_ended(migration.ended.result())

    def _withdraw(self, migration: OutgoingMigration) -> None:
        """Gives back what was offered, when its last reader has ended."""
        migration_id = migration.migration_id
        if migration.may_be_read:
            self._withdrawals[migration_id] = Withdrawal(
                migration_id, migration.destination, self._instance, self._withdrawal_ended
            )
        else:
            self._instance.tasks.start(self._instance.engine.unpin(migration_id))

    def _withdrawal_ended(self, withdrawal: Withdrawal) -> None:
        self._withdrawals.pop(withdrawal.migration_id, None)

    def _incoming_closed(self, migration: IncomingMigration) -> None:
        if migration.state_machine.state is DestinationState.ENDED:
            self._bytes_received += migration.bytes_copied
            self.num_refused += migration.was_refused
            self._incoming.pop(migration.migration_id, None)
