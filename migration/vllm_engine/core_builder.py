"""Builds vLLM's engine core with a migrating scheduler, and checks whether it can migrate."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore

from migration.transport.kv_transport import KvRegion
from migration.transport.regions import block_order, kv_regions
from migration.vllm_engine import compatibility, worker
from migration.vllm_engine.executor import executor_class
from migration.vllm_engine.migrating_scheduler import MigratingAsyncScheduler, MigratingScheduler

logger = logging.getLogger(__name__)


@dataclass
class BuiltCore:
    """An engine core on the step thread.

    Attributes:
        no_migration: Why requests cannot migrate; None if they can.
        regions: The KV cache's memory, if they can.
        compatibility: What has to be equal at the other end of a migration, by name.
    """

    core: EngineCore
    no_migration: str | None
    regions: list[KvRegion] = field(default_factory=list)
    compatibility: dict[str, str] = field(default_factory=dict)


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
    core = EngineCore(config, executor_class(config), log_stats=True, executor_fail_callback=on_failure)
    missing = missing or compatibility.missing_attributes(core)
    if missing:
        built = BuiltCore(core, "this vLLM lacks " + ", ".join(missing))
    else:
        unsupported = compatibility.unsupported_engine(config, core.scheduler)
        built = BuiltCore(core, unsupported)
    if built.no_migration is None:
        _map_kv_memory(built, config)
    if built.no_migration is not None:
        logger.warning("this engine serves without migration: %s", built.no_migration)
    return built


def _map_kv_memory(built: BuiltCore, config: VllmConfig) -> None:
    tensors = built.core.collective_rpc(worker.kv_caches)[0]
    num_blocks = built.core.scheduler.kv_cache_config.num_blocks
    try:
        built.regions = kv_regions(tensors, num_blocks)
    except ValueError as error:
        built.no_migration = str(error)
        return
    sizes = [region.block_bytes for region in built.regions]
    order = block_order(tensors, num_blocks)
    attention = built.core.collective_rpc(worker.attention)[0]
    groups = built.core.scheduler.cache_groups.description
    built.compatibility = compatibility.compatibility(config, groups, sizes, order, attention)
