"""The cache groups of an engine: which blocks a request has in each, and how some are reserved for one.

vLLM sorts the layers of a model into groups by the kind of their attention. Each group has a manager with a
block table for every request; all groups draw blocks from one pool. Two kinds can move:

- Full and latent attention, sliding windows, chunks: a full block is never written again. Blocks that have
  left the window are freed, and the null block takes their place.
- Linear attention (Mamba, gated delta nets, short convolutions): one block holds the state of a request, and
  every step overwrites it.

Source: vllm/v1/core/single_type_kv_cache_manager.py.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SlidingWindowManager,
)

from migration.engine_rules import BlockTable, blocks_for
from migration.messages import NO_BLOCK
from migration.vllm_engine.local_tier import LocalTier

#: Managers whose blocks are never written again when they are full. No subclasses: those of vLLM 0.32 do
#: other things with their blocks.
APPEND_ONLY = (FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager)


def unsupported_group(manager: Any) -> str | None:
    """Why requests with blocks in such a group cannot move; None if they can.

    Args:
        manager: One of vLLM's `SingleTypeKVCacheManager`s.
    """
    if type(manager) in APPEND_ONLY:
        return None
    if not has_state(manager):
        return f"a KV cache of kind {type(manager.kv_cache_spec).__name__}"
    if manager.mamba_cache_mode == "all":
        return "a cache of linear-attention states at every block (--mamba-cache-mode all)"
    if manager.num_speculative_blocks:
        return "speculative decoding with linear attention"
    return None


def has_state(manager: Any) -> bool:
    """Whether a group keeps one block for each request, which every step overwrites."""
    return type(manager) is MambaManager


class CacheGroups:
    """The block tables of one engine. Belongs to the step thread.

    Attributes:
        managers: vLLM's, one for each group.
        stage_tokens: Blocks of all groups without state end at multiples of it.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, tier: LocalTier | None = None) -> None:
        self.managers: Sequence[Any] = kv_cache_manager.coordinator.single_type_managers
        self._pool = kv_cache_manager.block_pool
        self._tier = tier or LocalTier(None, self._pool)
        self._with_state = [manager for manager in self.managers if has_state(manager)]
        self._append_only = [manager for manager in self.managers if not has_state(manager)]
        sizes = [manager.block_size for manager in self._append_only]
        self.stage_tokens: int = math.lcm(*sizes) if sizes else sys.maxsize

    @property
    def description(self) -> str:
        """Kind and block size of each group, which are equal in engines that exchange requests."""
        return ", ".join(f"{type(m.kv_cache_spec).__name__} of {m.block_size} tokens" for m in self.managers)

    def tables(self, request_id: str) -> list[BlockTable]:
        """The table of each group without state, and an empty one for each group with state."""
        return [self._table(manager, request_id) for manager in self.managers]

    def table_ids(self, request_id: str) -> list[list[int]]:
        """The same without the size of the blocks."""
        return [list(table.block_ids) for table in self.tables(request_id)]

    def states(self, request_id: str, num_computed_tokens: int) -> list[int]:
        """The block with the state after `num_computed_tokens` tokens, of each group with state."""
        return [
            manager.req_to_blocks[request_id][_state_place(manager, num_computed_tokens)].block_id
            for manager in self._with_state
        ]

    def num_blocks(self, request_id: str) -> int:
        """Blocks that a request holds, in all groups."""
        number = 0
        for manager in self.managers:
            held = manager.req_to_blocks.get(request_id, ())
            is_full = type(manager) is FullAttentionManager
            number += len(held) if is_full else sum(not block.is_null for block in held)
        return number

    def num_blocks_for(self, lengths: Sequence[int]) -> int:
        """Blocks that requests of these lengths, in tokens, need together, in all groups."""
        number = len(self._with_state) * len(lengths)
        for manager in self._append_only:
            size, most = manager.block_size, manager.max_admission_blocks_per_request or sys.maxsize
            number += sum([min(-(-length // size), most) for length in lengths])
        return number

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The fields of `EngineLoad` by which blocks for a number of tokens are estimated elsewhere."""
        most = [manager.max_admission_blocks_per_request for manager in self._append_only]
        windows = [blocks for blocks in most if blocks is not None]
        return {
            "block_tokens": (self._append_only or self._with_state)[0].block_size,
            "full_groups": len(most) - len(windows),
            "window_groups": len(windows),
            "window_blocks": sum(windows),
            "state_blocks": len(self._with_state),
        }

    # ---- for a request that is on its way here

    def without_states(self, computed: KVCacheBlocks) -> KVCacheBlocks:
        """Prefix cache hits without states: a request that comes brings that of its last token."""
        blocks = zip(self.managers, computed.blocks, strict=True)
        return KVCacheBlocks(tuple([] if manager in self._with_state else found for manager, found in blocks))

    @contextlib.contextmanager
    def filled_by_copy(self, request_id: str) -> Iterator[None]:
        """Blocks that the request gets meanwhile are written by a copy, at any time from then on.

        So they are not zeroed, perhaps after the copy: some may be in line for it already, those of a request
        that came, and ended before the next step. And nothing else may have to read them.
        """
        in_line = [list(manager.new_block_ids) for manager in self.managers]
        with self._tier.untouched():
            try:
                yield
            finally:
                blocks = [b for m in self.managers for b in m.req_to_blocks.get(request_id, ())]
                held = {block.block_id for block in blocks}
                for manager, ids in zip(self.managers, in_line, strict=True):
                    manager.new_block_ids[:] = [block_id for block_id in ids if block_id not in held]
                self._tier.forget_blocks(b.block_id for b in blocks if b.block_hash is None)

    def hold_states(self, request_id: str) -> list[int]:
        """Keeps one block for the state in each group that has one, wherever it will be in the table.

        Returns: these blocks.
        """
        return [self._hold_state(manager, request_id) for manager in self._with_state]

    def num_missing(self, request_id: str, num_tokens: int) -> int:
        """Blocks that the request's tables lack for `num_tokens` tokens."""
        lengths = [
            (manager.block_size, len(manager.req_to_blocks[request_id])) for manager in self._append_only
        ]
        return sum(max(0, blocks_for(num_tokens, size) - length) for size, length in lengths)

    def grow(self, request_id: str, num_tokens: int) -> None:
        """Makes the tables long enough for `num_tokens` tokens. There are enough free blocks."""
        for manager in self._append_only:
            manager.allocate_new_blocks(request_id, num_tokens, num_tokens)

    def complete(self, request_id: str, num_computed_tokens: int) -> None:
        """Brings the tables to the order that vLLM expects of a request with these tokens computed."""
        for manager in self._with_state:
            (state,) = manager.req_to_blocks[request_id]
            before = [self._pool.null_block] * _state_place(manager, num_computed_tokens)
            manager.req_to_blocks[request_id] = [*before, state]
            getattr(manager, "last_state_block_idx", {}).pop(request_id, None)
        for manager in self._append_only:
            # Some blocks may have been behind the window at the source, and not copied.
            manager.remove_skipped_blocks(request_id, num_computed_tokens)
            if manager.records_new_block_ids:
                empty = manager.req_to_blocks[request_id][
                    blocks_for(num_computed_tokens, manager.block_size) :
                ]
                manager.new_block_ids.extend(block.block_id for block in empty)

    def _hold_state(self, manager: Any, request_id: str) -> int:
        held: list[KVCacheBlock] = [block for block in manager.req_to_blocks[request_id] if not block.is_null]
        self._pool.free_blocks(held[:-1])
        manager.req_to_blocks[request_id] = held[-1:]
        return held[-1].block_id

    def _table(self, manager: Any, request_id: str) -> BlockTable:
        if manager in self._with_state:
            return BlockTable(manager.block_size, [])
        blocks = manager.req_to_blocks.get(request_id, ())
        ids = [NO_BLOCK if block.is_null else block.block_id for block in blocks]
        return BlockTable(manager.block_size, ids)


def _state_place(manager: Any, num_computed_tokens: int) -> int:
    """Index of the block with the state after `num_computed_tokens` tokens."""
    return int((num_computed_tokens - 1) // manager.block_size)


def groups_of(scheduler: Any) -> CacheGroups:
    """The cache groups of one of vLLM's schedulers; one with migration has them already."""
    known: CacheGroups | None = getattr(scheduler, "cache_groups", None)
    return known or CacheGroups(scheduler.kv_cache_manager)
