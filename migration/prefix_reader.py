"""The reader's side of prefix copies: brings the blocks of a prompt's prefix into this engine's cache.

A copy never fails its request: whatever goes wrong, the prompt is computed from what is here.
"""

import asyncio
import itertools
import logging
import uuid
from collections import Counter

from migration.errors import (
    DestinationRefusedError,
    EngineDeadError,
    MigrationError,
    PeerLostError,
    Refusal,
    RefusalCode,
)
from migration.local_instance import LocalInstance
from migration.messages import NO_BLOCK, InstanceId, KvPart, MigrationId
from migration.prefix_messages import (
    PrefixAsk,
    PrefixConfirmed,
    PrefixOffer,
    PrefixRead,
    PrefixRefused,
    ToPrefixReader,
)
from migration.prefix_store import PrefixQuery
from migration.reservation import Reservation

logger = logging.getLogger(__name__)


class PrefixCopy:
    """One copy, and the holder's answers to it."""

    def __init__(self, copy_id: MigrationId, holder: InstanceId) -> None:
        self.copy_id = copy_id
        self.holder = holder
        self._answers: asyncio.Queue[ToPrefixReader] = asyncio.Queue()

    def take(self, answer: ToPrefixReader) -> None:
        self._answers.put_nowait(answer)

    async def answer(self, bound_s: float) -> PrefixOffer | PrefixConfirmed:
        """The holder's next answer.

        Raises:
            DestinationRefusedError: it has refused.
            PeerLostError: none has come within the bound.
        """
        try:
            answer = await asyncio.wait_for(self._answers.get(), bound_s)
        except TimeoutError:
            raise PeerLostError(f"{self.holder} does not answer") from None
        if isinstance(answer, PrefixRefused):
            raise DestinationRefusedError(answer.refusal.code, f"{self.holder}: {answer.refusal.text}")
        return answer


class PrefixReader:
    """The prefix copies to one instance. Belongs to one event loop.

    Attributes:
        outcomes: Number of copies by outcome: "copied", or the code of the refusal.
        tokens_copied: Tokens whose KV copies have brought into the prefix cache.
        bytes_copied: What was read.
    """

    def __init__(self, instance: LocalInstance) -> None:
        self.outcomes: Counter[str] = Counter()
        self.tokens_copied = self.bytes_copied = 0
        self._instance = instance
        self._copies: dict[MigrationId, PrefixCopy] = {}
        self._serial = itertools.count()
        self._incarnation = uuid.uuid4().hex[:8]  # ids from before a restart must not match

    async def copy(self, holder: InstanceId, payload: list[bytes]) -> None:
        """Copies as much as possible of a prompt's prefix from `holder`; returns when that has ended.

        Every wait in it has a bound. It is not to be cancelled, except when the instance stops.

        Args:
            payload: The request, as in `Engine.add`.
        """
        bounds = self._instance.bounds
        if holder == self._instance.name:
            return
        if len(self._copies) >= bounds.max_prefix_copies:
            self.outcomes[RefusalCode.TOO_MANY_MIGRATIONS] += 1
            return
        copy_id = MigrationId(f"{self._instance.name}.{self._incarnation}.prefix.{next(self._serial)}")
        copy = self._copies[copy_id] = PrefixCopy(copy_id, holder)
        try:
            query = self._instance.engine.prefixes.query(payload)
            await self._try(copy, query)
        finally:
            del self._copies[copy_id]

    async def _try(self, copy: PrefixCopy, query: PrefixQuery) -> None:
        try:
            await self._copy(copy, query)
        except EngineDeadError:
            raise
        except MigrationError as error:
            self.outcomes[error.refusal.code] += 1
            logger.debug("prefix copy %s from %s: %s", copy.copy_id, copy.holder, error)
        except Exception:  # whatever the holder has said: the prompt is computed
            self.outcomes[RefusalCode.COPY_FAILED] += 1
            logger.exception("prefix copy %s from %s has failed", copy.copy_id, copy.holder)
        else:
            self.outcomes["copied"] += 1

    def on_message(self, holder: InstanceId, message: ToPrefixReader) -> None:
        copy = self._copies.get(message.copy_id)
        if copy is not None and copy.holder == holder:
            copy.take(message)
        elif isinstance(message, PrefixOffer):
            # It is too late: the holder need not wait for the end of the lease.
            self._instance.send(holder, PrefixRead(message.copy_id))

    def peer_lost(self, peer: InstanceId) -> None:
        """A peer is known to be dead."""
        for copy in self._copies.values():
            if copy.holder == peer:
                copy.take(PrefixRefused(copy.copy_id, Refusal(RefusalCode.PEER_LOST, f"{peer} died")))

    @property
    def under_way(self) -> set[MigrationId]:
        return set(self._copies)

    def check_integrity(self) -> list[str]:
        """Copies under way; there are none at rest."""
        return [
            f"a prefix is being copied from {copy.holder}: {copy.copy_id}" for copy in self._copies.values()
        ]

    async def _copy(self, copy: PrefixCopy, query: PrefixQuery) -> None:
        instance, copy_id = self._instance, copy.copy_id
        store, bounds = instance.engine.prefixes, instance.bounds
        if not query.hashes:
            raise DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, "no prefix of it can be shared")
        instance.send(copy.holder, PrefixAsk(copy_id, query.hashes, query.max_tokens, query.compatibility))
        offer = await copy.answer(bounds.prefix_reply_s)
        if not isinstance(offer, PrefixOffer):
            raise PeerLostError(f"{copy.holder} confirms what it has not offered")
        held = Reservation([], [], 0)
        try:
            try:
                if offer.part.end > query.max_tokens:
                    raise PeerLostError(f"{copy.holder} offers more tokens than the prompt has")
                held = await store.reserve(copy_id, query, offer.part)
                self.bytes_copied += await self._read(copy, offer, held.tables)
            finally:
                instance.send(copy.holder, PrefixRead(copy_id))
            await self._confirmed(copy)
        except Exception:  # at a cancellation the instance stops
            await self._drop(
                copy_id, [block for table in held.tables for block in table if block != NO_BLOCK]
            )
            raise
        await store.publish(copy_id)
        self.tokens_copied += offer.part.end - held.tokens_present

    async def _read(self, copy: PrefixCopy, offer: PrefixOffer, tables: list[list[int]]) -> int:
        pairs = _block_pairs(offer.part, tables)
        if not pairs:
            return 0
        try:
            async with asyncio.timeout(self._instance.bounds.prefix_read_s):
                return await self._instance.read(
                    copy.holder,
                    offer.kv_endpoint,
                    [theirs for theirs, _ in pairs],
                    [ours for _, ours in pairs],
                )
        except TimeoutError:
            text = f"reading the prefix from {copy.holder} takes too long"
            raise DestinationRefusedError(RefusalCode.TIMED_OUT, text) from None

    async def _confirmed(self, copy: PrefixCopy) -> None:
        """Waits until the holder has confirmed; an offer that comes twice is no confirmation."""
        while not isinstance(await copy.answer(self._instance.bounds.prefix_reply_s), PrefixConfirmed):
            pass

    async def _drop(self, copy_id: MigrationId, blocks: list[int]) -> None:
        store, quarantine = self._instance.engine.prefixes, self._instance.transport.quarantine

        async def drop_when_quiet() -> None:
            await quarantine.wait_for(blocks)
            await store.drop(copy_id)

        if quarantine.holds(blocks):
            self._instance.tasks.start(drop_when_quiet())  # the request need not wait for that
        else:
            await store.drop(copy_id)


def _block_pairs(part: KvPart, tables: list[list[int]]) -> list[tuple[int, int]]:
    """Blocks of the holder, each with the local block that it is for."""
    pairs = [
        (theirs, table[run.first + index])
        for run, table in zip(part.runs, tables, strict=bool(tables))
        for index, theirs in enumerate(run.block_ids)
        if table
    ]
    return [pair for pair in pairs if NO_BLOCK not in pair]
