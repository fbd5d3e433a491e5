"""vLLM's prefix cache as a `PrefixStore`: its calls run on the step thread, between two steps."""

from typing import Any

from vllm.v1.core import kv_cache_utils

from migration.engine_rules import mismatch
from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import KvPart, MigrationId
from migration.prefix_store import PrefixQuery
from migration.reservation import Reservation
from migration.vllm_engine.prefix_blocks import PrefixBlocks
from migration.vllm_engine.request_loader import RequestLoader
from migration.vllm_engine.step_loop import StepLoop


class VllmPrefixStore:
    """Implements `migration.prefix_store.PrefixStore`.

    Args:
        scheduler: A migrating one; None if the engine cannot migrate, which shares no prefix.
        compatibility: What has to be equal in engines that exchange requests.
    """

    def __init__(
        self, steps: StepLoop, loader: RequestLoader, scheduler: Any, compatibility: dict[str, str]
    ) -> None:
        self._steps = steps
        self._loader = loader
        self._scheduler = scheduler
        #: Hashes start from a value that is random for some hash functions.
        first = getattr(kv_cache_utils, "NONE_HASH", b"")
        self._compatibility = compatibility | {"first block hash": bytes(first).hex()}

    def query(self, payload: list[bytes]) -> PrefixQuery:
        request = self._loader.read(payload)
        usable = self._scheduler is not None and not request.skip_reading_prefix_cache
        hashes = [bytes(block_hash) for block_hash in request.block_hashes] if usable else []
        return PrefixQuery(hashes, request.num_tokens - 1, self._compatibility, request)

    async def offer(self, copy_id: MigrationId, query: PrefixQuery) -> KvPart:
        if self._scheduler is None:
            text = "this engine shares no blocks"
            raise DestinationRefusedError(RefusalCode.UNSUPPORTED_ENGINE, text)
        if (why := mismatch(query.compatibility, self._compatibility)) is not None:
            raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, why)
        scheduler, blocks = self._scheduler, self._blocks
        hashes = [kv_cache_utils.BlockHash(block_hash) for block_hash in query.hashes]

        def pin() -> tuple[KvPart, int]:
            most = min(query.max_tokens, len(hashes) * scheduler.kv_cache_manager.block_pool.hash_block_size)
            part = blocks.find(hashes, most)
            scheduler.migrated_blocks.pin(copy_id, part.block_ids)
            return part, scheduler.sched_step_seq

        part, step = await self._steps.call(pin)
        # vLLM adds a block to the cache when it schedules the step that computes it.
        while (
            scheduler.defer_block_free and await self._steps.call(lambda: scheduler.processed_step_seq) < step
        ):
            pass
        return part

    async def reserve(self, copy_id: MigrationId, query: PrefixQuery, part: KvPart) -> Reservation:

        def reserve() -> Reservation:
            kept_free = self._scheduler._inflight_prefill_reserved_blocks()
            return self._blocks.reserve(copy_id, query.prompt, part, kept_free)

        return await self._steps.call(reserve)

    async def publish(self, copy_id: MigrationId) -> None:
        await self._steps.call(lambda: self._blocks.publish(copy_id))

    async def drop(self, copy_id: MigrationId) -> None:
        await self._steps.call(lambda: self._blocks.drop(copy_id))

    @property
    def _blocks(self) -> PrefixBlocks:
        blocks: PrefixBlocks = self._scheduler.migrated_blocks.prefixes
        return blocks
