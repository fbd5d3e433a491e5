"""Whether the instances fit into the memory of this machine."""

from pathlib import Path
from typing import Any

import psutil

from pd_serve.errors import InvalidRequestError
from pd_serve.platform.placement import num_workers

#: Memory of an API server, or of a process of an engine beside weights and KV cache, in bytes (measured:
#: 0.5-0.6 GB).
PROCESS_BYTES = 600 * 2**20

#: Memory of a process of simulated instances, and of each instance in it, in bytes (measured: 80 MiB of its
#: own with one instance, 234 to 335 MiB with 16); they have neither weights nor a KV cache.
SIMULATED_PROCESS_BYTES, SIMULATED_BYTES = 80 * 2**20, 20 * 2**20


def check_memory(
    num_instances: int,
    engine_args: dict[str, Any],
    model: str,
    *,
    simulated: bool = False,
    api_servers: int = 1,
    per_process: int = 1,
) -> None:
    """Checks whether processes that are to start fit into this machine's free memory.

    Args:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        model: Its directory, if it has one.
        per_process: Simulated instances that share a process.

    Raises:
        InvalidRequestError: They would not.
    """
    front_end = api_servers * PROCESS_BYTES
    if simulated:
        processes = -(-num_instances // per_process)
        needed = processes * SIMULATED_PROCESS_BYTES + num_instances * SIMULATED_BYTES + front_end
        return _check(num_instances, needed, "start fewer")
    weights = sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    kv = int(engine_args.get("kv_cache_memory_bytes") or 0)
    workers = num_workers(engine_args)
    processes = workers + 1 if workers > 1 else 1
    needed = num_instances * (processes * PROCESS_BYTES + weights + workers * kv) + front_end
    _check(num_instances, needed, "start fewer, or set a smaller --kv-cache-memory-bytes")


def _check(num_instances: int, needed: int, advice: str) -> None:
    available = psutil.virtual_memory().available
    if needed > available:
        raise InvalidRequestError(
            f"{num_instances} instances need about {needed / 2**30:.1f} GiB,"
            f" {available / 2**30:.1f} GiB are free: {advice}"
        )
