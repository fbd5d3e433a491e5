"""Environment variables of the service's processes."""

import os
import secrets
from pathlib import Path

#: Variables of the operator that instances on other machines get, too.
LOGGING_VARIABLES = ("PD_SERVE_LOG_FORMAT", "PD_SERVE_LOG_LEVEL", "VLLM_CONFIGURE_LOGGING")

#: Keeps all sockets of a service on one machine on the loopback interface.
LOOPBACK = {
    "UCX_NET_DEVICES": "lo",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: the node's address is 127.0.0.1
}

#: Settings of Ray in a local cluster, which runs only this service, for a short start-up time.
LOCAL_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine needs more than Ray's 30
    "RAY_worker_niceness": "0",  # the workers are the service, not batch jobs beside it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def engine_environment(num_instances: int, model: str, *, vllm_plugins: bool = False) -> dict[str, str]:
    """Environment of every process of the service. To be set before vLLM is imported.

    Variables that the operator has set keep their values.

    Args:
        num_instances: Instances that share this machine's cores.
        model: Directory or hub name of the model; with a directory, nothing is looked up on a hub.
        vllm_plugins: Whether vLLM loads its plugins, which costs start-up time.
    """
    threads = max(1, (os.cpu_count() or 1) // max(1, num_instances))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core is stepped in the instance's own process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # an instance has threads, with which a fork may hang
        "GLOO_SOCKET_IFNAME": "lo",  # an engine's process groups do not leave its machine
    }
    if not vllm_plugins:
        environment["VLLM_PLUGINS"] = ""
    if Path(model).is_dir():
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= {name: os.environ[name] for name in LOGGING_VARIABLES if name in os.environ}
    return {name: os.environ.get(name, value) for name, value in environment.items()}


def ray_environment(ray_address: str | None) -> dict[str, str]:
    """Environment of the process that starts or joins Ray. To be set before Ray is imported.

    It must not be set later, nor in actors: Ray reads its authentication mode once, when it is imported, and
    a process in which the variable and Ray disagree cannot join any cluster.
    """
    environment = {
        "RAY_DEDUP_LOGS": "0",  # Ray would leave out what decode-1 logs after decode-0
        # An instance's workers end with it; Python's process that frees their shared memory ends after them.
        "RAY_kill_child_processes_on_worker_exit": "0",
        "RAY_process_group_cleanup_enabled": "0",
    }
    if ray_address is None:
        environment |= LOOPBACK | LOCAL_RAY
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Ray's ports require a token. Ray's own token is permanent, in a file that others can read.
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        environment["RAY_AUTH_MODE"] = "token"  # Ray would set it later, for processes that start then
    elif (Path.home() / ".ray" / "auth_token").is_file():
        # Ray uses its token by default only in clusters that it starts or finds itself.
        environment["RAY_AUTH_MODE"] = "token"
    return {name: os.environ.get(name, value) for name, value in environment.items()}
