"""Which KV heads a tensor-parallel worker has, so that engines of several sizes can exchange requests."""

from collections.abc import Iterable
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowMLASpec

from migration.transport.kv_transport import KvHeads

_OTHER_DIVISIONS = {
    "pipeline_parallel_size": "pipeline stages divide the layers",
    "decode_context_parallel_size": "decode context parallelism divides the tokens of a block",
    "prefill_context_parallel_size": "prefill context parallelism divides the tokens of a block",
}


_LINEAR = "states of linear attention are not divided by heads alone"


def unsupported_widths(vllm_configs: Iterable[Any]) -> str | None:
    """Why requests cannot move between engines with these settings, if their numbers of workers differ.

    What depends on the layers and their memory, only the engines know: see `heads_of_rank`.
    """
    configs = list(vllm_configs)
    if len({config.parallel_config.tensor_parallel_size for config in configs}) < 2:
        return None
    reasons = [
        why
        for config in configs
        for name, why in _OTHER_DIVISIONS.items()
        if getattr(config.parallel_config, name) > 1
    ]
    models = [config.model_config for config in configs]
    reasons += [_LINEAR for model in models if model.is_hybrid or model.is_attention_free]
    return f"several tensor parallel sizes, although {reasons[0]}" if reasons else None


def heads_of_rank(vllm_config: Any, specs: Iterable[Any], rank: int) -> tuple[KvHeads, int]:
    """The heads that every block of a rank holds, and the number of all.

    vLLM gives each rank an equal share of the heads, or one head to several ranks if there are more ranks.
    The latent vectors of MLA are the same on all ranks: one head.

    Args:
        specs: vLLM's `KVCacheSpec` of each layer, or one for layers that are alike.
        rank: In the tensor-parallel group.

    Raises:
        ValueError: Blocks are not divided by heads, or not all layers in the same way; with the reason.

    Source: QKVParallelLinear in vllm/model_executor/layers/linear.py.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name, why in _OTHER_DIVISIONS.items():
        if getattr(parallel, name) > 1:
            raise ValueError(why)
    specs = list(specs)
    for spec in specs:
        if isinstance(spec, MambaSpec):
            raise ValueError(_LINEAR)
        if not isinstance(spec, AttentionSpec):
            raise ValueError(f"a KV cache of kind {type(spec).__name__} is not divided by heads")
    if all(isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec) for spec in specs):
        return KvHeads(0, 1), 1
    ranks, total = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    totals = {total} if draft is None else {total, draft.get_total_num_kv_heads()}
    numbers = {spec.num_heads for spec in specs} | {spec.num_kv_heads for spec in specs}
    if len(totals) > 1 or numbers != {max(1, total // ranks)}:
        raise ValueError("not all layers have the model's number of KV heads")
    return KvHeads(rank * total // ranks, numbers.pop()), total
