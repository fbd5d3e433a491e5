"""Builds vLLM's engine core with a migrating scheduler, and checks whether it can migrate."""

import logging
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from migration.engine_interface import EngineFacts
from migration.transport.head_slices import common_heads
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.worker_transport import WorkerMemory
from migration.vllm_engine import compatibility, worker
from migration.vllm_engine.cached_keys import CachedKeys
from migration.vllm_engine.executor import executor_class
from migration.vllm_engine.grammars import Grammars
from migration.vllm_engine.migrating_scheduler import MigratingAsyncScheduler, MigratingScheduler

logger = logging.getLogger(__name__)

#: Time for a worker that has started its transport to be connected, in seconds.
CONNECT_S = 10.0


@dataclass
class BuiltCore:
    """An engine core on the step thread.

    Attributes:
        no_migration: Why requests cannot migrate; None if they can.
        regions: The KV cache's memory, if they can and it is in this process.
        workers: The KV cache's memory, if they can and it is in workers' processes, by rank.
        compatibility: What has to be equal at the other end of a migration, by name.
        cached_keys: Of its prefix cache.
    """

    core: EngineCore
    no_migration: str | None
    cached_keys: CachedKeys
    regions: list[KvRegion] = field(default_factory=list)
    workers: list[WorkerMemory] = field(default_factory=list)
    compatibility: dict[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> EngineFacts:
        scheduler, cache_config = self.core.scheduler, self.core.vllm_config.cache_config
        return EngineFacts(
            no_migration=self.no_migration,
            max_model_len=scheduler.max_model_len,
            num_blocks=cache_config.num_gpu_blocks,
            block_tokens=scheduler.block_size,
            supported_tasks=tuple(self.core.get_supported_tasks()),
            key_format=self.cached_keys.format,
        )


def build_core(config: VllmConfig, on_failure: Callable[[], None] = lambda: None) -> BuiltCore:
    """Loads the model.

    Args:
        on_failure: Called, in any thread, when a worker's process has ended: no further step is possible.

    Raises:
        Exception: Whatever vLLM raises.
    """
    scheduling = config.scheduler_config
    missing = compatibility.missing_names()
    if not missing:
        # The class has to match: a synchronous scheduler under an asynchronous configuration loses the
        # overlap of scheduling and execution.
        scheduling.scheduler_cls = (
            MigratingAsyncScheduler if scheduling.async_scheduling else MigratingScheduler
        )
    configuration = compatibility.model_configuration(config)
    core = EngineCore(config, executor_class(config), log_stats=True, executor_fail_callback=on_failure)
    Grammars.take_over(core.structured_output_manager)
    if not isinstance(core.model_executor, UniProcExecutor):
        core.collective_rpc(worker.end_with_instance)
    if missing := missing or compatibility.missing_attributes(core):
        why: str | None = "this vLLM lacks " + ", ".join(missing)
    else:
        why = compatibility.unsupported_engine(config, core.scheduler)
    built = BuiltCore(core, why, CachedKeys(config, core.scheduler))
    if built.no_migration is None:
        _map_kv_memory(built, config, configuration)
    if built.no_migration is not None:
        logger.warning("this engine serves without migration: %s", built.no_migration)
    return built


def _map_kv_memory(built: BuiltCore, config: VllmConfig, configuration: str) -> None:
    core, num_blocks = built.core, built.core.scheduler.kv_cache_config.num_blocks
    layouts = core.collective_rpc(worker.kv_layout, args=(num_blocks,))
    if reasons := [layout for layout in layouts if isinstance(layout, str)]:
        built.no_migration = reasons[0]
        return
    groups = core.scheduler.cache_groups.description
    built.compatibility = compatibility.compatibility(config, configuration, groups, layouts)
    if isinstance(core.model_executor, UniProcExecutor):
        built.regions = layouts[0].regions
    else:
        built.workers = _connect_workers(core, num_blocks, [common_heads(of.regions) for of in layouts])


def _connect_workers(
    core: EngineCore, num_blocks: int, heads: Sequence[KvHeads | None]
) -> list[WorkerMemory]:
    """Starts a transport in each worker's process, and connects to them."""
    with tempfile.TemporaryDirectory(prefix="pd-serve-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/workers"
        listener.bind(path)
        listener.listen(core.vllm_config.parallel_config.world_size)
        listener.settimeout(CONNECT_S)
        endpoints = core.collective_rpc(worker.serve_kv_cache, args=(path, num_blocks))
        connections = {}
        for _ in endpoints:
            connection, _ = listener.accept()
            rank = int.from_bytes(connection.recv(4, socket.MSG_WAITALL))
            connections[rank] = connection
    return [
        WorkerMemory(rank, endpoint, connections[rank], heads[rank])
        for rank, endpoint in enumerate(endpoints)
    ]
