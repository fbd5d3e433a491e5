"""A local KV tier beside a played model runner: vLLM's offloading connector with copies that take time."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.outputs import KVConnectorOutput

#: Of the tier: 64 blocks of the played model, which are small, in whole pages.
_TIER_BYTES = 64 * 4096


def offloading_config() -> KVTransferConfig:
    """What `--kv-offloading-size` becomes."""
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": _TIER_BYTES},
    )


@dataclass
class PlayedTier:
    """The worker's side of the connector.

    A copy to the tier is done some steps after its request, unless the connector waits for it; until then
    it may read any of its blocks.

    Attributes:
        memory: The runner's, by block.
        chunks: The tier's.
        delay: Steps that a copy takes.
        loaded: Blocks that have come from the tier.
    """

    memory: dict[int, list[int]]
    chunks: dict[int, list[int]] = field(default_factory=dict)
    delay: int = 2
    loaded: int = 0
    _stores: deque[tuple[int, int, TransferJob]] = field(default_factory=deque)  # due step, job id
    _loads: dict[int, TransferJob] = field(default_factory=dict)
    _done: OffloadingWorkerMetadata = field(default_factory=OffloadingWorkerMetadata)
    _steps: int = 0

    def before_forward(self, metadata: Any) -> None:
        """`OffloadingConnectorWorker.handle_preemptions`."""
        assert isinstance(metadata, OffloadingConnectorMetadata)
        flushed = metadata.jobs_to_flush or set()
        for job_id in [job_id for job_id in metadata.store_jobs if job_id in flushed]:
            self._stores.append((self._steps, job_id, metadata.store_jobs.pop(job_id)))
        self._complete(lambda due, job_id: job_id in flushed)

    def after_forward(self, metadata: OffloadingConnectorMetadata) -> KVConnectorOutput:
        """`start_kv_transfers`, `prepare_store_kv` and `get_finished`."""
        self._steps += 1
        received = self._load()
        self._loads.update(metadata.load_jobs)
        due = self._steps + self.delay
        self._stores.extend((due, job_id, job) for job_id, job in metadata.store_jobs.items())
        self._complete(lambda due, job_id: due <= self._steps)
        done, self._done = self._done, OffloadingWorkerMetadata()
        return KVConnectorOutput(finished_recving=received or None, kv_connector_worker_meta=done)

    def _load(self) -> set[str]:
        for job_id, job in self._loads.items():
            for chunk, block in _pairs(job.src_spec, job.dst_spec):
                self.memory[block] = list(self.chunks[chunk])
                self.loaded += 1
            self._done.mark_completed(job_id)
        received = {job.req_id for job in self._loads.values()}
        self._loads.clear()
        return received

    def _complete(self, is_due: Any) -> None:
        for entry in list(self._stores):
            due, job_id, job = entry
            if is_due(due, job_id):
                self._stores.remove(entry)
                for block, chunk in _pairs(job.src_spec, job.dst_spec):
                    self.chunks[chunk] = list(self.memory.get(block, ()))
                self._done.mark_completed(job_id)


def _pairs(source: Any, destination: Any) -> Iterable[tuple[int, int]]:
    return zip(source.block_ids.tolist(), destination.block_ids.tolist(), strict=True)
