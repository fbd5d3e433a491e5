"""The holder's side of prefix copies: finds blocks in the prefix cache and pins them while they are read."""

from dataclasses import dataclass

from migration.errors import DestinationRefusedError, Refusal, RefusalCode
from migration.local_instance import LocalInstance
from migration.messages import InstanceId, MigrationId
from migration.prefix_messages import (
    PrefixAsk,
    PrefixConfirmed,
    PrefixOffer,
    PrefixRead,
    PrefixRefused,
    ToPrefixHolder,
)
from migration.prefix_store import PrefixQuery
from migration.tasks import Timer


@dataclass
class PrefixLease:
    """Blocks that a reader may read. `offered` once they are pinned."""

    reader: InstanceId
    timer: Timer
    offered: bool = False


class PrefixHolder:
    """Serves the prefix copies of other instances. Belongs to one event loop.

    A lease ends with the reader's `PrefixRead`, with the reader, or after `lease_s`. Only a lease that is in
    force when `PrefixRead` arrives is confirmed, so a reader that was late, or stood still, shares nothing.
    """

    def __init__(self, instance: LocalInstance) -> None:
        self._instance = instance
        self._leases: dict[MigrationId, PrefixLease] = {}

    def on_message(self, reader: InstanceId, message: ToPrefixHolder) -> None:
        match message:
            case PrefixAsk():
                self._on_ask(reader, message)
            case PrefixRead(copy_id=copy_id):
                lease = self._leases.get(copy_id)
                if lease is not None and lease.reader == reader and lease.offered:
                    self._end(copy_id)
                    self._instance.send(reader, PrefixConfirmed(copy_id))
                else:
                    self._refuse(reader, copy_id, Refusal(RefusalCode.TIMED_OUT, "the lease has ended"))

    def peer_lost(self, peer: InstanceId) -> None:
        """A peer is known to be dead: it reads no more."""
        for copy_id in [copy_id for copy_id, lease in self._leases.items() if lease.reader == peer]:
            self._end(copy_id)

    def close(self) -> None:
        """Disarms the timers: the instance stops."""
        for lease in self._leases.values():
            lease.timer.set(None)
        self._leases.clear()

    @property
    def under_way(self) -> set[MigrationId]:
        return set(self._leases)

    def check_integrity(self) -> list[str]:
        """Leases; there are none at rest."""
        return [
            f"{lease.reader} has a lease of a prefix: {copy_id}" for copy_id, lease in self._leases.items()
        ]

    def _on_ask(self, reader: InstanceId, ask: PrefixAsk) -> None:
        bounds = self._instance.bounds
        if ask.copy_id in self._leases:
            return  # it comes twice
        if ask.max_tokens < 1:
            refusal = Refusal(RefusalCode.UNSUPPORTED_REQUEST, "no token of the prefix is of use")
            return self._refuse(reader, ask.copy_id, refusal)
        if len(self._leases) >= bounds.max_prefix_leases:
            text = f"{bounds.max_prefix_leases} prefixes are being read already"
            return self._refuse(reader, ask.copy_id, Refusal(RefusalCode.TOO_MANY_MIGRATIONS, text))
        lease = PrefixLease(reader, Timer(lambda: self._end(ask.copy_id)))
        self._leases[ask.copy_id] = lease
        self._instance.tasks.start(self._offer(lease, ask))

    async def _offer(self, lease: PrefixLease, ask: PrefixAsk) -> None:
        copy_id, instance = ask.copy_id, self._instance
        query = PrefixQuery(ask.hashes, ask.max_tokens, ask.compatibility)
        try:
            part = await instance.engine.prefixes.offer(copy_id, query)
            refusal = None if part.end else Refusal(RefusalCode.NOT_HERE, "no block of the prefix is here")
        except DestinationRefusedError as error:
            refusal = error.refusal
        if self._leases.get(copy_id) is not lease:
            await instance.engine.unpin(copy_id)  # the reader has died meanwhile
        elif refusal is not None:
            self._end(copy_id)
            self._refuse(lease.reader, copy_id, refusal)
        else:
            lease.offered = True
            lease.timer.set(instance.bounds.prefix_lease_s)
            instance.send(lease.reader, PrefixOffer(copy_id, part, instance.transport.endpoint()))

    def _end(self, copy_id: MigrationId) -> None:
        lease = self._leases.pop(copy_id)
        lease.timer.set(None)
        self._instance.tasks.start(self._instance.engine.unpin(copy_id))

    def _refuse(self, reader: InstanceId, copy_id: MigrationId, refusal: Refusal) -> None:
        self._instance.send(reader, PrefixRefused(copy_id, refusal))
