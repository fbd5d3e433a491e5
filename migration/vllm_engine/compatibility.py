"""Which engines and which requests can migrate, and whether this vLLM has all names that migration uses.

A request that cannot move is refused with the reason and stays where it is.
"""

import hashlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migration.vllm_engine.worker import KvLayout

#: How an engine's workers share its KV cache: settings of vLLM's `ParallelConfig`.
PARALLELISM = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)

#: Methods of `EngineCore` that vLLM's front end may call by name.
UTILITIES = frozenset(
    {
        "get_supported_tasks",
        "reset_mm_cache",
        "reset_prefix_cache",
        "reset_encoder_cache",
        "is_sleeping",
        "is_scheduler_paused",
        "list_loras",
        "load_adapter",
        "get_weight_version",
    }
)

#: Private or undocumented names of vLLM 0.32 that migration relies on: "module:object.attribute", and
#: for functions the parameters that are passed by name.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_request": (),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": (),
    "vllm.v1.core.sched.scheduler:Scheduler._inflight_prefill_reserved_blocks": (),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": ("request_ids", "finished_status"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": (),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "num_new_computed_tokens",
        "new_computed_blocks",
        "num_lookahead_tokens",
        "num_external_computed_tokens",
        "delay_cache_blocks",
        "reserved_blocks",
        "has_scheduled_reqs",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": (),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks": ("num_computed_tokens",),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": (),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager": (),
    "vllm.v1.core.single_type_kv_cache_manager:ChunkedLocalAttentionManager": (),
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager": (),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.allocate_new_blocks": (),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks": (),
    "vllm.v1.core.block_pool:BlockHashToBlockMap.insert": ("key", "block"),
    "vllm.v1.core.block_pool:BlockHashToBlockMap.pop": ("key", "block_id"),
    "vllm.v1.core.block_pool:BlockPool.touch": (),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": (),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free": (),
    "vllm.v1.worker.utils:AttentionGroup": (
        "backend",
        "kv_cache_spec",
        "kernel_block_size",
        "metadata_builders",
    ),
    "vllm.v1.kv_cache_interface:AttentionSpec": ("num_kv_heads", "num_head_slots"),
    "vllm.config:ModelConfig.get_total_num_kv_heads": (),
    "vllm.v1.engine.core:EngineCore.step": (),
    "vllm.v1.engine.core:EngineCore.step_with_batch_queue": (),
    "vllm.v1.engine.core:EngineCore.post_step": (),
}

#: The same for continuing a request that was lost with its instance, which needs nothing of the above.
RELIED_ON_TO_CONTINUE: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.worker_base:WorkerWrapperBase": ("global_rank",),
    "vllm.v1.engine.core:EngineCore": ("executor_fail_callback",),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": (),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": (),
    "vllm.v1.request:Request.append_output_token_ids": (),
    "vllm.v1.request:Request.take_events": (),
    "vllm.v1.request:RequestStatus.PREEMPTED": (),
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id",
        "prompt_token_ids",
        "mm_features",
        "sampling_params",
        "pooling_params",
        "block_ids",
        "num_computed_tokens",
        "lora_request",
        "prompt_embeds",
        "prompt_is_token_ids",
    ),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        "req_id",
        "prompt_token_ids",
        "mm_features",
        "sampling_params",
        "generator",
        "block_ids",
        "num_computed_tokens",
        "output_token_ids",
        "lora_request",
        "prompt_embeds",
        "prompt_is_token_ids",
    ),
}

_OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler"

#: The same for engines with a local KV tier (`--kv-offloading-size`).
RELIED_ON_BESIDE_A_TIER: dict[str, tuple[str, ...]] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:OffloadingConnector.scheduler": (),
    f"{_OFFLOADING}:OffloadingConnectorScheduler.on_new_request": ("request",),
    f"{_OFFLOADING}:TransferJobStatus": ("is_store", "deferred_fence_block_ids", "fenced_block_ids"),
    f"{_OFFLOADING}:RequestGroupState": ("block_ids",),
    f"{_OFFLOADING}:RequestOffloadState.max_offload_tokens": (),
    f"{_OFFLOADING}:RequestOffloadState.finished_signaled": (),
    f"{_OFFLOADING}:RequestOffloadState.group_states": (),
}

#: The same for attributes that only instances have.
RELIED_ON_SCHEDULER = (
    "requests",
    "connector",
    "running",
    "waiting",
    "kv_holding_waiting",
    "finished_req_ids",
    "deferred_frees",
    "defer_block_free",
    "sched_step_seq",
    "processed_step_seq",
    "max_num_running_reqs",
    "max_num_active_reqs",
    "max_num_scheduled_tokens",
    "kv_cache_manager",
    "block_size",
    "hash_block_size",
    "num_lookahead_tokens",
    "use_v2_model_runner",
)
RELIED_ON_CACHE_GROUP = (
    "block_size",
    "kv_cache_spec",
    "max_admission_blocks_per_request",
    "new_block_ids",
    "num_cached_block",
    "records_new_block_ids",
    "req_to_blocks",
)
RELIED_ON_REQUEST = (
    "num_computed_tokens",
    "num_in_flight_tokens",
    "num_preemptions",
    "is_prefill_chunk",
    "num_output_tokens",
    "prefill_stats",
    "spec_token_ids",
    "status",
)


def missing_names() -> list[str]:
    """The names that migration relies on and this vLLM does not have."""
    return _missing(RELIED_ON) + missing_to_continue()


def missing_to_continue() -> list[str]:
    """The names of `RELIED_ON_TO_CONTINUE` that this vLLM does not have."""
    return _missing(RELIED_ON_TO_CONTINUE)


def _missing(relied_on: dict[str, tuple[str, ...]]) -> list[str]:
    import importlib

    missing = []
    for path, parameters in relied_on.items():
        module_name, _, qualified = path.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for name in qualified.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            missing.append(path)
            continue
        known = inspect.signature(found).parameters if parameters else {}
        missing += [f"{path}({p}=)" for p in parameters if p not in known]
    return missing


def missing_attributes(core: Any) -> list[str]:
    """The same for a running engine core."""
    from vllm.v1.request import Request

    from migration.vllm_engine import worker

    scheduler = core.scheduler
    source = inspect.getsource(Request.__init__)
    missing = [f"Scheduler.{name}" for name in RELIED_ON_SCHEDULER if not hasattr(scheduler, name)]
    missing += [
        f"Request.{name}"
        for name in RELIED_ON_REQUEST
        if f"self.{name}" not in source and not hasattr(Request, name)
    ]
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    missing += [
        f"{type(manager).__name__}.{name}"
        for manager in managers
        for name in RELIED_ON_CACHE_GROUP
        if not hasattr(manager, name)
    ]
    return missing + core.collective_rpc(worker.missing_attributes)[0]


def unsupported_config(vllm_config: Any) -> str | None:
    """Why requests of an engine with these settings cannot migrate, whatever the model; None if they may."""
    connector = vllm_config.kv_transfer_config
    if connector is None:
        return None
    if connector.kv_connector != "OffloadingConnector" or connector.kv_connector_module_path is not None:
        return f"a KV connector of its own ({connector.kv_connector})"
    if missing := _missing(RELIED_ON_BESIDE_A_TIER):
        return "this vLLM lacks " + ", ".join(missing)
    return None


def unsupported_engine(vllm_config: Any, scheduler: Any) -> str | None:
    """Why requests of such an engine cannot migrate, or None."""
    from migration.vllm_engine.cache_groups import has_state, unsupported_group

    if (why := unsupported_config(vllm_config)) is not None:
        return why
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if scheduler.connector is not None and any(map(has_state, managers)):
        return "linear attention beside a KV tier"
    return next((why for manager in managers if (why := unsupported_group(manager)) is not None), None)


#: A request whose inputs are larger stays. An offer has them in one message, and the wire carries up to
#: `pd_serve.comm.wire.MAX_FRAME_BYTES`.
MAX_MOVED_BYTES = 64 * 2**20

#: What a request that cannot migrate has, by the reason's name.
UNMOVABLE = {
    "pooling": "no tokens to decode (pooling)",
    "no_data": "multimodal input whose data was not sent with it",
    "too_large": f"inputs of more than {MAX_MOVED_BYTES >> 20} MiB",
    "session": "a streaming-input session",
    "kv_transfer": "a KV transfer of its own",
}


def unmovable(request: Any, payload: Sequence[bytes] = ()) -> str | None:
    """Why this request (vLLM's `Request`) cannot migrate, one of `UNMOVABLE`; None if it can.

    Args:
        payload: The request as the API server sent it.
    """
    if request.pooling_params is not None or request.sampling_params is None:
        return "pooling"
    if any(feature.data is None for feature in request.mm_features):
        return "no_data"
    if sum(map(len, payload)) > MAX_MOVED_BYTES:
        return "too_large"
    if request.resumable:
        return "session"
    if request.kv_transfer_params or request.ec_transfer_params:
        return "kv_transfer"
    return None


def has_only_tokens(parameters: Any) -> bool:
    """Whether a request's outputs follow from its output tokens; for vLLM's `SamplingParams`, or None."""
    return (
        parameters is not None
        and parameters.logprobs is None
        and parameters.logprob_token_ids is None
        and parameters.prompt_logprobs is None
        and parameters.prompt_logprob_token_ids is None
    )


def model_configuration(vllm_config: Any) -> str:
    """A digest of the model's own configuration.

    To be asked for before the model is loaded: some models change their configuration, which would be seen
    here only if the worker is in this process.
    """
    return hashlib.sha256(vllm_config.model_config.hf_config.to_json_string().encode()).hexdigest()[:12]


def compatibility(
    vllm_config: Any, configuration: str, groups: str, layouts: "Sequence[KvLayout]"
) -> dict[str, str]:
    """What has to be equal on both sides of a migration, by name.

    Blocks of equal size may hold their bytes in another order (NHD or HND; keys packed for an instruction
    set). A copy of such a block would be read as garbage, without an error.

    Args:
        configuration: See `model_configuration`.
        groups: See `migration.vllm_engine.cache_groups.CacheGroups.description`.
        layouts: Of the KV cache of each worker, by rank.

    Source: compute_nixl_compatibility_hash in vllm/distributed/kv_transfer/kv_connector/v1/nixl/metadata.py,
    and what that connector compares at a handshake.
    """
    import vllm

    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    division, sizes = _division(parallel, layouts)
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
    return {
        "vllm version": str(vllm.__version__),
        "model": f"{model.model}@{model.revision}",
        "model configuration": configuration,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "KV cache dtype": str(cache.cache_dtype),
        "block size": str(cache.block_size),
        "cache groups": groups,
        **division,
        "KV layout": f"{cache.kv_cache_layout}, {len(layouts[0].regions)} regions, {digest}",
        "order of a KV block": ", ".join(dict.fromkeys(layout.block_order for layout in layouts)),
        **layouts[0].attention,
    }


def _division(parallel: Any, layouts: "Sequence[KvLayout]") -> tuple[dict[str, str], Sequence[object]]:
    """What has to be equal of how ranks divide blocks, and the sizes of what they are divided into."""
    degrees = {degree.replace("_", " "): str(getattr(parallel, degree)) for degree in PARALLELISM}
    for layout in layouts:
        if layout.undivided is not None:
            degrees["tensor parallel size"] += f" ({layout.undivided})"
            return degrees, [[region.block_bytes for region in layout.regions] for layout in layouts]
    heads = [region.heads for layout in layouts for region in layout.regions if region.heads is not None]
    degrees |= {"tensor parallel size": "any", "KV heads": str(max(held.end for held in heads))}
    of_ranks = [[(r.parts, r.head_bytes) for r in layout.regions] for layout in layouts]
    return degrees, [sizes for rank, sizes in enumerate(of_ranks) if sizes not in of_ranks[:rank]]
