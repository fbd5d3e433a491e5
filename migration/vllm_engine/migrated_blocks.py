"""KV blocks of vLLM's pool that a peer reads, or that came from one and are not confirmed yet."""

import sys
from collections.abc import Collection, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from migration.vllm_engine.cache_groups import has_state
from migration.vllm_engine.local_tier import LocalTier
from migration.vllm_engine.prefix_blocks import PrefixBlocks

#: More blocks than any request has.
_ALL_BLOCKS = sys.maxsize


class MigratedBlocks:
    """Pins blocks that are read, and keeps arrived blocks out of the prefix cache until they are confirmed.

    A pin is a reference of its own to each block, so that it outlives the request. A request whose blocks
    are not confirmed counts all of its blocks as cached already, so that vLLM does not add any.

    Attributes:
        pinned: By migration id.
        unconfirmed: Number of cached blocks at the commit in each cache group, by request id.
        prefixes: Blocks of prefixes, without a request.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, tier: LocalTier) -> None:
        self.pinned: dict[str, list[KVCacheBlock]] = {}
        self.unconfirmed: dict[str, list[int]] = {}
        self.prefixes = PrefixBlocks(kv_cache_manager, tier)
        self._manager = kv_cache_manager
        self._tier = tier

    def pin(self, reader: str, block_ids: list[int]) -> None:
        """Keeps blocks as they are for a migration. Those that it was offered before have been read."""
        pool = self._manager.block_pool
        blocks = [pool.blocks[block_id] for block_id in block_ids]
        pool.touch(blocks)
        self.unpin(reader)
        if blocks:
            self.pinned[reader] = blocks

    def unpin(self, reader: str) -> None:
        """Idempotent."""
        if (blocks := self.pinned.pop(reader, None)) is not None:
            self._manager.block_pool.free_blocks(reversed(blocks))

    def hold_back(self, request: Request) -> None:
        """Keeps the blocks of a request that enters out of the prefix cache, those that it decodes too."""
        request_id = request.request_id
        self.unconfirmed[request_id] = [counts.get(request_id, 0) for counts in self._num_cached_blocks]
        for counts in self._num_cached_blocks:
            counts[request_id] = _ALL_BLOCKS
        self._tier.enter(request)

    def confirm(self, request: Request) -> None:
        """Adds the blocks of a request to the prefix cache. Idempotent.

        Blocks with a state stay out of it: the state that came may have been overwritten by now.
        """
        request_id = request.request_id
        self._tier.confirm(request_id)
        cached = self.unconfirmed.pop(request_id, None)
        if cached is None or any(counts.get(request_id) != _ALL_BLOCKS for counts in self._num_cached_blocks):
            return  # preempted meanwhile
        for manager, number in zip(self._managers, cached, strict=True):
            if not has_state(manager):
                manager.num_cached_block[request_id] = number
        self._manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.unconfirmed.pop(request_id, None)

    def check_integrity(self, known: set[str], under_way: Collection[str]) -> list[str]:
        """Pins for migrations that are not under way, and entries of requests that are not known."""
        problems = [
            f"{len(blocks)} blocks are pinned for {reader}"
            for reader, blocks in self.pinned.items()
            if reader not in under_way
        ]
        if lost := self.unconfirmed.keys() - known:
            problems.append(f"ended requests are remembered as unconfirmed: {sorted(lost)}")
        return problems + self.prefixes.check_integrity(under_way)

    @property
    def _managers(self) -> Sequence[Any]:
        managers: Sequence[Any] = self._manager.coordinator.single_type_managers
        return managers

    @property
    def _num_cached_blocks(self) -> list[dict[str, int]]:
        """How many of its first blocks each request has in the prefix cache, by cache group."""
        return [manager.num_cached_block for manager in self._managers]
