"""A local KV tier beside an engine (`--kv-offloading-size`), and the blocks that it still has to read.

vLLM's offloading connector copies full blocks to the tier some steps after they were computed. By then a
block may be free. Before a step writes to such a block, the connector waits for the copy; it knows of the
blocks that vLLM's scheduler allocates, and of no others. A migration writes between two steps:

- A request that comes gets no block that a copy to the tier reads, or will read.
- Blocks that it got, and that had been of a window that has passed, are not copied any more.
- Its own blocks are copied to the tier from when they are confirmed, as they enter the prefix cache then.

Source: vllm/distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request


class LocalTier:
    """The connector of one scheduler, or none, with which nothing has to be done. For the step thread."""

    def __init__(self, connector: OffloadingConnector | None, pool: BlockPool) -> None:
        self._connector = connector
        self._state: Any = connector.scheduler if connector else None
        self._pool = pool

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """No block is allocated meanwhile that a copy to the tier reads, or will read."""
        if self._connector is None:
            yield
            return
        blocks = [self._pool.blocks[block_id] for block_id in self._blocks_to_read()]
        free = [block for block in blocks if block.ref_cnt == 0 and not block.is_null]
        self._pool.touch(free)
        try:
            yield
        finally:
            self._pool.free_blocks(free)

    def forget_blocks(self, taken: Iterable[int]) -> None:
        """Blocks that were free have got other contents: they are not those of a former window any more."""
        if self._connector is None:
            return
        taken = set(taken)
        for status in self._state._req_status.values():
            for group in self._state._sliding_window_groups:
                ids = status.group_states[group].block_ids
                ids[:] = [0 if block_id in taken else block_id for block_id in ids]

    def enter(self, request: Request) -> None:
        """A request has come with its blocks, which are not confirmed."""
        if self._connector is None:
            return
        self._connector.on_new_request(request)
        self._state._req_status[request.request_id].max_offload_tokens = 0

    def confirm(self, request_id: str) -> None:
        """Idempotent."""
        if self._connector and (status := self._state._req_status.get(request_id)) is not None:
            status.max_offload_tokens = None

    def _blocks_to_read(self) -> set[int]:
        """Of copies that are not done, and of those that the next step asks for when a request has ended."""
        state = self._state
        stores = [job for job in state._jobs.values() if job.is_store]
        lists = [job.deferred_fence_block_ids or () for job in stores]
        lists += [job.fenced_block_ids or () for job in stores]
        ended = [s for s in state._req_status.values() if s.req.is_finished() and not s.finished_signaled]
        lists += [group.block_ids for status in ended for group in status.group_states]
        return {block_id for ids in lists for block_id in ids}


def tier_of(scheduler: Any) -> LocalTier:
    """The tier beside one of vLLM's schedulers; none if its connector is of a kind that is not known here."""
    connector = scheduler.connector if type(scheduler.connector) is OffloadingConnector else None
    return LocalTier(connector, scheduler.kv_cache_manager.block_pool)
