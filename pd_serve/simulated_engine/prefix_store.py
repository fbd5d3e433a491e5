"""A simulated engine's prefix cache as a `PrefixStore`."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from migration.engine_rules import mismatch
from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import NO_BLOCK, BlockRun, KvPart, MigrationId
from migration.prefix_store import PrefixQuery
from migration.reservation import Reservation
from pd_serve.simulated_engine.batcher import Batcher
from pd_serve.simulated_engine.migrations import SequenceMigrations
from pd_serve.simulated_engine.sequence import Sequence

#: Bytes of a hash.
HASH_BYTES = 8


@dataclass(slots=True)
class HeldPrefix:
    """Blocks held for a copy: those that are here already, and those to be filled, with their hashes."""

    shared: list[int]
    fresh: list[int]
    hashes: list[int]


class SimulatedPrefixStore:
    """Implements `migration.prefix_store.PrefixStore`.

    Args:
        call: Runs a function between two steps; the name is for faults.

    Attributes:
        reserved: By id of the copy.
    """

    def __init__(
        self,
        batcher: Batcher,
        migrations: SequenceMigrations,
        decode: Callable[[list[bytes]], Sequence],
        call: Callable[[str, Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self.reserved: dict[str, HeldPrefix] = {}
        self._batcher = batcher
        self._migrations = migrations
        self._decode = decode
        self._call = call

    def query(self, payload: list[bytes]) -> PrefixQuery:
        sequence = self._decode(payload)
        values = self._hashes(sequence) if self._caches else []
        hashes = [_packed(value) for value in values]
        return PrefixQuery(hashes, sequence.num_tokens - 1, self._migrations.compatibility, values)

    async def offer(self, copy_id: MigrationId, query: PrefixQuery) -> KvPart:
        if (why := mismatch(query.compatibility, self._migrations.compatibility)) is not None:
            raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, why)
        block_tokens = self._batcher.settings.block_tokens
        hashes = [int.from_bytes(value, "little", signed=True) for value in query.hashes]
        hashes = hashes[: query.max_tokens // block_tokens]

        def offer() -> KvPart:
            found = self._batcher.pool.cached(hashes) if self._caches else []
            part = KvPart(len(found) * block_tokens, [BlockRun(0, found)])
            self._migrations.pin(copy_id, part)
            return part

        found: KvPart = await self._call("offer_prefix", offer)
        return found

    async def reserve(self, copy_id: MigrationId, query: PrefixQuery, part: KvPart) -> Reservation:
        hashes: list[int] = query.prompt
        block_tokens = self._batcher.settings.block_tokens

        def reserve() -> Reservation:
            number = part.end // block_tokens
            if len(part.runs) != 1 or part.runs[0].first or len(part.runs[0].block_ids) != number:
                text = "the prefix that is offered does not fit this engine"
                raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, text)
            pool = self._batcher.pool
            shared = pool.cached(hashes[:number])
            if not self._caches or len(shared) == number:
                return Reservation([], [], len(shared) * block_tokens)
            missing = number - len(shared)
            if missing > pool.num_free - pool.num_unused(shared):
                text = f"a prefix of {missing} KV blocks, {pool.num_free} are free"
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, text)
            pool.share(shared)
            fresh = pool.allocate(missing)
            self.reserved[copy_id] = HeldPrefix(shared, fresh, hashes[len(shared) : number])
            return Reservation([[NO_BLOCK] * len(shared) + fresh], [], len(shared) * block_tokens)

        held: Reservation = await self._call("reserve_prefix", reserve)
        return held

    async def publish(self, copy_id: MigrationId) -> None:
        def publish() -> None:
            if (reserved := self.reserved.get(copy_id)) is not None:
                for block, value in zip(reserved.fresh, reserved.hashes, strict=True):
                    self._batcher.pool.publish(block, value)
                self._release(copy_id)

        await self._call("publish_prefix", publish)

    async def drop(self, copy_id: MigrationId) -> None:
        await self._call("drop_prefix", lambda: self._release(copy_id))

    @property
    def held_blocks(self) -> list[int]:
        """All reserved blocks, once for each reservation."""
        return [block for held in self.reserved.values() for block in (*held.shared, *held.fresh)]

    @property
    def _caches(self) -> bool:
        return self._batcher.settings.prefix_caching

    def _hashes(self, sequence: Sequence) -> list[int]:
        """The hash of each block of the prompt that can be taken from a cache."""
        self._batcher.hash_blocks(sequence, (sequence.num_tokens - 1) // self._batcher.settings.block_tokens)
        return sequence.hashes

    def _release(self, copy_id: MigrationId) -> None:
        if (reserved := self.reserved.pop(copy_id, None)) is not None:
            self._batcher.pool.release([*reserved.shared, *reserved.fresh])


def _packed(value: int) -> bytes:
    return value.to_bytes(HASH_BYTES, "little", signed=True)
