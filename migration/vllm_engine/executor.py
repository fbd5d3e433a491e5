"""Set-up of vLLM's executor: its class of workers, and what several workers of one instance share."""

import os
from typing import Any

from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

#: vLLM's worker for CPUs, and the one that replaces it; names, as a GPU build cannot import either.
VLLM_CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
CPU_WORKER = "migration.vllm_engine.cpu_worker.CorrectedCpuWorker"


def executor_class(config: Any) -> type[Executor]:
    """Prepares a configuration's workers, and returns the class of their executor.

    Workers with processes of their own share the threads of the instance, as OMP_NUM_THREADS has them. They
    read the environment when they start.
    """
    parallel = config.parallel_config
    if parallel.worker_cls == VLLM_CPU_WORKER:
        parallel.worker_cls = CPU_WORKER
    chosen = Executor.get_class(config)
    if not issubclass(chosen, UniProcExecutor):
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal():
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // parallel.world_size))
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of vLLM's imports, at every start
    return chosen
