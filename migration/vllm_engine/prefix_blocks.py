"""Blocks of a prefix that another engine reads out of vLLM's prefix cache, or that are to fill it.

All methods run on the engine's step thread, between steps. Source: vllm/v1/core/kv_cache_coordinator.py
(`find_longest_cache_hit`) and vllm/v1/core/block_pool.py (`cache_full_blocks`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import NO_BLOCK, BlockRun, KvPart
from migration.reservation import Reservation
from migration.vllm_engine.local_tier import LocalTier


@dataclass(slots=True)
class ReservedPrefix:
    """Blocks held for a copy.

    Attributes:
        request: It has the hashes of the blocks. No scheduler knows it.
        shared: The blocks of its prefix that are here already.
        firsts: Index of the first block to be copied, by cache group.
        tables: From there on, the null block where nothing is to be copied, by cache group.
        end: Tokens of the prefix.
    """

    request: Request
    shared: list[KVCacheBlock]
    firsts: list[int]
    tables: list[list[KVCacheBlock]]
    end: int


class PrefixBlocks:
    """See `migration.prefix_store.PrefixStore`.

    Attributes:
        reserved: By id of the copy.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, tier: LocalTier) -> None:
        self.reserved: dict[str, ReservedPrefix] = {}
        self._coordinator = kv_cache_manager.coordinator
        self._pool = kv_cache_manager.block_pool
        self._managers: Sequence[Any] = self._coordinator.single_type_managers
        self._tier = tier

    def find(self, hashes: list[BlockHash], max_tokens: int) -> KvPart:
        """The longest cached prefix that ends with a block of every group."""
        blocks, end = self._longest(hashes, max_tokens)
        return KvPart(end, [BlockRun(0, _ids(found)) for found in blocks])

    def reserve(self, copy_id: str, request: Request, part: KvPart, kept_free: int) -> Reservation:
        """Holds blocks for what is offered and not here already; see `PrefixStore`.

        Args:
            kept_free: Blocks that are to stay free.

        Raises:
            DestinationRefusedError: nothing is held.
        """
        self._check(request, part)
        ours, present = self._longest(request.block_hashes, part.end)
        if present >= part.end:
            return Reservation([], [], present)
        firsts = [present // manager.block_size for manager in self._managers]
        offered = [run.block_ids[first:] for run, first in zip(part.runs, firsts, strict=True)]
        number = sum(block_id != NO_BLOCK for block_ids in offered for block_id in block_ids)
        shared = [block for found in ours for block in found if not block.is_null]
        self._pool.touch(shared)
        with self._tier.untouched():
            if number > (free := self._pool.get_num_free_blocks() - kept_free):
                self._pool.free_blocks(reversed(shared))
                text = f"a prefix of {number} KV blocks, {free} are free"
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, text)
            fresh = self._pool.get_new_blocks(number)
        self._tier.forget_blocks(block.block_id for block in fresh)
        self._keep_from_zeroing(fresh)
        blocks, null = iter(fresh), self._pool.null_block
        tables = [
            [null if block_id == NO_BLOCK else next(blocks) for block_id in block_ids]
            for block_ids in offered
        ]
        self.reserved[copy_id] = ReservedPrefix(request, shared, firsts, tables, part.end)
        ids = [[NO_BLOCK] * first + _ids(table) for first, table in zip(firsts, tables, strict=True)]
        return Reservation(ids, [], present)

    def publish(self, copy_id: str) -> None:
        """The blocks enter the prefix cache. Idempotent."""
        if (reserved := self.reserved.get(copy_id)) is None:
            return
        null = self._pool.null_block
        for manager, first, table in zip(self._managers, reserved.firsts, reserved.tables, strict=True):
            self._pool.cache_full_blocks(
                request=reserved.request,
                blocks=[null] * first + table,
                num_cached_blocks=first,
                num_full_blocks=first + len(table),
                block_size=manager.block_size,
                kv_cache_group_id=manager.kv_cache_group_id,
            )
        self.drop(copy_id)

    def drop(self, copy_id: str) -> None:
        """Gives the blocks back: those that are in the prefix cache stay there until they are evicted."""
        if (reserved := self.reserved.pop(copy_id, None)) is None:
            return
        for table in reserved.tables:
            self._pool.free_blocks([block for block in reversed(table) if not block.is_null])
        self._pool.free_blocks(reversed(reserved.shared))

    def check_integrity(self, under_way: Collection[str]) -> list[str]:
        """Reservations for copies that are not under way."""
        ended = [copy_id for copy_id in self.reserved if copy_id not in under_way]
        return [f"blocks are reserved for the prefix copy {copy_id}" for copy_id in ended]

    def _longest(
        self, hashes: list[BlockHash], max_tokens: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The blocks of each group, and the tokens, of the longest cached prefix of whole blocks."""
        blocks, end, _ = self._coordinator.find_longest_cache_hit(hashes, max_tokens)
        if any(end % manager.block_size for manager in self._managers):
            return tuple([] for _ in self._managers), 0  # it ends within a block of one group
        return blocks, end

    def _check(self, request: Request, part: KvPart) -> None:
        """Raises: DestinationRefusedError: the offer is none for this request in this engine."""
        fits = len(part.runs) == len(self._managers) and 0 < part.end < request.num_tokens
        if not fits or any(
            run.first or len(run.block_ids) * manager.block_size != part.end
            for run, manager in zip(part.runs, self._managers, strict=True)
        ):
            text = "the prefix that is offered does not fit this engine's cache groups"
            raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, text)

    def _keep_from_zeroing(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Blocks in line to be zeroed, from a request that has ended, are filled by a copy instead."""
        held = {block.block_id for block in blocks}
        for manager in self._managers:
            manager.new_block_ids[:] = [
                block_id for block_id in manager.new_block_ids if block_id not in held
            ]


def _ids(blocks: Sequence[KVCacheBlock]) -> list[int]:
    return [NO_BLOCK if block.is_null else block.block_id for block in blocks]
