"""Whether the instances fit into the memory of this machine."""

from pathlib import Path
from typing import Any

import psutil

from pd_serve.errors import InvalidRequestError
from pd_serve.platform.placement import num_workers

#: Memory of a process of an engine beside weights and KV cache, in bytes (measured: 0.5-0.6 GB).
PROCESS_BYTES = 600 * 2**20

#: Memory of an instance with a simulated engine, in bytes (measured: 80 MiB of its own); it has neither
#: weights nor a KV cache.
SIMULATED_BYTES = 100 * 2**20


def check_memory(
    num_instances: int, engine_args: dict[str, Any], model: str, *, simulated: bool = False
) -> None:
    """Raises: InvalidRequestError: the instances would not fit into this machine's free memory."""
    if simulated:
        return _check(num_instances, num_instances * SIMULATED_BYTES + PROCESS_BYTES, "start fewer")
    weights = sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    kv = int(engine_args.get("kv_cache_memory_bytes") or 0)
    workers = num_workers(engine_args)
    processes = workers + 1 if workers > 1 else 1
    needed = num_instances * (processes * PROCESS_BYTES + weights + workers * kv) + PROCESS_BYTES
    _check(num_instances, needed, "start fewer, or set a smaller --kv-cache-memory-bytes")


def _check(num_instances: int, needed: int, advice: str) -> None:
    available = psutil.virtual_memory().available
    if needed > available:
        raise InvalidRequestError(
            f"{num_instances} instances need about {needed / 2**30:.1f} GiB,"
            f" {available / 2**30:.1f} GiB are free: {advice}"
        )
