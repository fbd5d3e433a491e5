"""What the check tries: kinds of engines, each with two instances on one device."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pd_serve.models import default_dtype, resolve, tiny
from pd_serve.models.cache import cached_directory
from pd_serve.models.kinds import KINDS

MIB = 1 << 20

#: For the downtime at lengths up to 8k: the model of `make bench` with a longer context.
LONG_MODEL = tiny.RandomLlama(
    "1", 2, 768, 3328, num_layers=8, num_heads=8, num_kv_heads=8, max_context_tokens=16384
)


#: Graphs without compilation, which would take a minute.
_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
_HALF = {"dtype": "bfloat16"}
_NO_GRAPHS = "CUDA graphs"
_ON_CPU = "this CPU build, or its attention"


@dataclass(frozen=True)
class Case:
    """One kind of engine.

    Attributes:
        model: A model that is made here.
        arguments: Of vLLM's `AsyncEngineArgs`, beside those that all engines of the check have.
        environment: Of both instances.
        seeded: Whether a seeded request is tried, too. With speculation its tokens depend on the drafts.
        lengths: Measures the downtime at these lengths of prompts, in tokens; checks outputs if empty.
        cuda_only: Why a CPU does not run it; None if it does.
        adapter: Whether its requests have a LoRA adapter.
    """

    name: str
    model: str = "tiny"
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seeded: bool = True
    lengths: tuple[int, ...] = ()
    cuda_only: str | None = None
    adapter: bool = False

    def engine_arguments(self, device: str) -> dict[str, Any]:
        """All arguments of `AsyncEngineArgs`. Makes the model."""
        if self.model == "long":
            path = str(cached_directory(f"gpu-check-r{LONG_MODEL.recipe}", partial(tiny.build, LONG_MODEL)))
        else:
            path = resolve(self.model)
        every = {
            "model": path,
            "dtype": default_dtype(self.model),
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,  # a prompt is computed in chunks
            "enforce_eager": True,
            "kv_cache_memory_bytes": 256 * MIB,
            "distributed_executor_backend": "uni",
            "use_tqdm_on_load": False,
        }
        if device == "cpu":
            every |= {"block_size": 32, "kv_cache_memory_bytes": 32 * MIB}
        else:
            every["gpu_memory_utilization"] = 0.1  # two engines share the device
            # Triton's attention takes float32, the other backends do not.
            mla = "deepseek" in self.model
            every |= (
                _HALF | {"attention_backend": "TRITON_MLA"} if mla else {"attention_backend": "TRITON_ATTN"}
            )
        kind = KINDS.get(self.model)
        return (kind.engine_arguments if kind is not None else {}) | every | self.arguments


CASES = [
    Case("tiny"),
    Case("tiny, no prefix cache", arguments={"enable_prefix_caching": False}),
    *(Case(name, model=name) for name in KINDS),
    Case(
        "ngram",
        arguments={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            }
        },
        seeded=False,
    ),
    Case("LoRA", arguments={"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}, adapter=True),
    Case("synchronous scheduling", arguments={"async_scheduling": False}, cuda_only="CPUs have no other"),
    Case("V1 model runner", environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}, cuda_only="CPUs have no other"),
    Case("CUDA graphs", arguments=_GRAPHS, cuda_only=_NO_GRAPHS),
    Case("attention of vLLM's choice", arguments=_HALF | {"attention_backend": None}, cuda_only=_ON_CPU),
    Case("NHD", arguments=_HALF, environment={"VLLM_KV_CACHE_LAYOUT": "NHD"}, cuda_only=_ON_CPU),
    Case(
        "layers inside each block",
        arguments=_HALF,
        environment={"VLLM_KV_CACHE_LAYOUT": "BLHNC"},
        cuda_only=_ON_CPU,
    ),
    Case("HND", arguments=_HALF, environment={"VLLM_KV_CACHE_LAYOUT": "HND"}, cuda_only=_ON_CPU),
    Case("FP8 KV cache", arguments=_HALF | {"kv_cache_dtype": "fp8"}, cuda_only=_ON_CPU),
    Case("downtime, tiny", arguments={"enable_prefix_caching": False}, lengths=(256, 1024)),
    Case(
        "downtime",
        model="long",
        arguments=_HALF
        | _GRAPHS
        | {
            "attention_backend": None,
            "max_model_len": 12288,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": 2048 * MIB,
            "enable_prefix_caching": False,
        },
        lengths=(1024, 4096, 8192),
        cuda_only=_NO_GRAPHS,
    ),
]
