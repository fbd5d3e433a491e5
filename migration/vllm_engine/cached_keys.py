"""Which blocks vLLM's prefix cache has gained and lost."""

import os
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from migration.cached_keys import ChangeRecord, KeyChanges, KeyFormat, key_of
from migration.vllm_engine.cache_groups import APPEND_ONLY
from migration.vllm_engine.step_loop import StepLoop

_insert, _pop = BlockHashToBlockMap.insert, BlockHashToBlockMap.pop


class RecordingMap(BlockHashToBlockMap):
    """vLLM's map from hashes to cached blocks, which records the hashes of one cache group that come and go.

    Args:
        former: The map whose blocks it takes over.
        suffix: The end of the group's hashes.
    """

    def __init__(self, former: BlockHashToBlockMap, suffix: bytes) -> None:
        self._cache = former._cache
        self._suffix = suffix
        self.record: ChangeRecord[BlockHashWithGroupId] = ChangeRecord()
        self.record.restart(key for key in self._cache if key.endswith(suffix))

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        if key not in self._cache and key[-4:] == self._suffix:
            changes = self.record.changes  # as `gained` does it: this runs for every block of the step thread
            if changes.pop(key, None) is None:
                changes[key] = True
        _insert(self, key, block)

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        block = _pop(self, key, block_id)
        if block is not None and key not in self._cache and key[-4:] == self._suffix:
            changes = self.record.changes
            if changes.pop(key, None) is None:
                changes[key] = False
        return block


class CachedKeys:
    """The keys of one engine's prefix cache. Belongs to the step thread, `has_changed` excepted.

    They are those of one cache group: the first one with full attention, or else the first one whose blocks
    are not written again. Nothing is recorded before the first look.

    Args:
        vllm_config: Of the engine.
        scheduler: One of vLLM's, with or without migration.

    Attributes:
        format: None if the engine has no prefix cache, or keys that no other process can compute.
    """

    def __init__(self, vllm_config: Any, scheduler: Any) -> None:
        self._pool = scheduler.kv_cache_manager.block_pool
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        full = [manager for manager in managers if type(manager) is FullAttentionManager]
        groups = full or [manager for manager in managers if type(manager) in APPEND_ONLY]
        self.format = _format(vllm_config, scheduler, groups[0]) if groups else None
        self._suffix = groups[0].kv_cache_group_id.to_bytes(4, "big") if groups else b""

    @property
    def has_changed(self) -> bool:
        """Whether a look would find anything. For any thread."""
        present = self._pool.cached_block_hash_to_block
        return self.format is not None and (not isinstance(present, RecordingMap) or bool(present.record))

    def take(self, most: int) -> tuple[list[bytes], list[bytes], bool]:
        """See `ChangeRecord.take`. vLLM replaces its map when it empties the cache, also by a new one."""
        present = self._pool.cached_block_hash_to_block
        if not isinstance(present, RecordingMap):
            present = RecordingMap(present, self._suffix)
            self._pool.cached_block_hash_to_block = present
        return present.record.take(most)


class RecordedKeys:
    """Implements `migration.engine_interface.CachedKeySource`."""

    def __init__(self, keys: CachedKeys, steps: StepLoop) -> None:
        self._keys = keys
        self._steps = steps

    async def take(self, most: int) -> KeyChanges | None:
        if not self._keys.has_changed:
            return None
        gained, lost, anew = await self._steps.call(lambda: self._keys.take(most))
        return KeyChanges(list(map(key_of, gained)), list(map(key_of, lost)), anew)


def _format(vllm_config: Any, scheduler: Any, group: Any) -> KeyFormat | None:
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    is_random = algorithm.startswith("xxhash") and "PYTHONHASHSEED" not in os.environ
    if not scheduler.kv_cache_manager.enable_caching or is_random:
        return None
    if group.block_size % scheduler.hash_block_size:
        return None
    root = kv_cache_utils.NONE_HASH.hex()
    return KeyFormat(algorithm, scheduler.hash_block_size, group.block_size, root)
