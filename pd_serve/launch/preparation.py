"""From a configuration to what processes are started with: the model, vLLM's flags, the environment."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pd_serve import models
from pd_serve.comm.wire import CurveKeys
from pd_serve.config import (
    CPU_PREFILL_CHUNK_TOKENS,
    CPU_STAGE_BYTES_PER_S,
    Placement,
    ServeConfig,
    cpu_engine_defaults,
    is_cpu_build,
    process_environment,
)
from pd_serve.manager.manager import ManagerConfig
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import ROLES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pd_serve.launch.engine_flags import ParsedFlags

#: Below it most vocabularies have control tokens and single bytes; smaller ones are made of bytes.
FIRST_WORD = 1000


def find_model(config: ServeConfig) -> tuple[str, dict[str, str]]:
    """The model's directory or hub name, and the environment of every process, which is set here, too."""
    model = models.resolve(config.model)
    environment = process_environment(config, model)
    os.environ.update(environment)
    return model, environment


@dataclass(frozen=True, slots=True)
class Prepared:
    """vLLM's flags, read and checked; `engine_config` is vLLM's own configuration of an instance."""

    config: ServeConfig
    model: str
    environment: dict[str, str]
    flags: "ParsedFlags"
    engine_config: "VllmConfig"

    @property
    def placements(self) -> dict[str, Placement]:
        """What instances ask of their machine, by role."""
        return placements(self.config, float(self.flags.server.tensor_parallel_size))

    def manager_config(self, host: str, keys: CurveKeys) -> ManagerConfig:
        config = self.config
        return ManagerConfig(
            self.model,
            config.instances,
            config.autoscale,
            config.max_instances,
            config.policies,
            {role: self.flags.engine(role) for role in ROLES},
            self.placements,
            host,
            keys,
            self.environment,
            CPU_STAGE_BYTES_PER_S if is_cpu_build() else None,
            self._simulated(),
            config.replaces,
            checks_memory=config.ray_address is None,
        )

    def _simulated(self) -> EngineSettings | None:
        """What the engines are like, if simulated: they say plain words of the model's vocabulary."""
        if self.config.simulated is None:
            return None
        size = self.engine_config.model_config.get_vocab_size()
        words = (ord("a"), 26) if size < FIRST_WORD else (FIRST_WORD, size - FIRST_WORD)
        return replace(self.config.simulated, vocabulary=words)


def placements(config: ServeConfig, workers: float) -> dict[str, Placement]:
    """By role; an instance on GPUs takes one for each of its tensor-parallel workers."""
    gpus = 0.0 if is_cpu_build() or config.simulated is not None else workers
    return {role: Placement(gpus, config.resources.get(role, {}), config.accelerator_type) for role in ROLES}


def parse(config: ServeConfig, model: str, environment: dict[str, str]) -> Prepared:
    """Reads vLLM's flags; imports vLLM. Raises: InvalidRequestError."""
    from pd_serve.launch.engine_flags import parse as parse_flags
    from pd_serve.observe.tracing import prepare_tracing, traces_endpoint

    prepare_tracing()
    defaults: dict[str, Any] = {
        "model": model,
        "served_model_name": [config.served_model_name or models.served_name(config.model)],
        "host": config.host,
        "port": config.port,
    }
    if config.api_keys:
        defaults["api_key"] = list(config.api_keys)
    if (dtype := models.default_dtype(config.model)) is not None:
        defaults["dtype"] = dtype
    if (endpoint := traces_endpoint(os.environ)) is not None:
        defaults["otlp_traces_endpoint"] = endpoint
    role_defaults: dict[str, dict[str, Any]] = {}
    if is_cpu_build():
        defaults |= cpu_engine_defaults()
        role_defaults["prefill"] = {"max_num_batched_tokens": CPU_PREFILL_CHUNK_TOKENS}
    flags = parse_flags(config.engine_flags, defaults, role_defaults)
    # Refuses what does not fit together before anything is started, and fills vLLM's cache of model
    # inspections, which every instance would otherwise do for itself.
    engine_config = flags.engine_config("decode" if config.instances["decode"] else "neutral")
    return Prepared(config, model, environment, flags, engine_config)
