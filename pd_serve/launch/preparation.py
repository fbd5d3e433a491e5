"""From the settings to what processes are started with: the model, vLLM's flags, the environment."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pd_serve import models
from pd_serve.comm.wire import CurveKeys
from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.instance.engine_factory import no_handoffs
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.platform.cpu import (
    CPU_PREFILL_CHUNK_TOKENS,
    CPU_STAGE_BYTES_PER_S,
    cpu_engine_defaults,
    is_cpu_build,
)
from pd_serve.platform.environment import engine_environment
from pd_serve.platform.placement import Placement
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import ROLES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pd_serve.launch.engine_flags import ParsedFlags

#: Below this token id most vocabularies hold control tokens and single bytes; smaller ones are made of bytes.
FIRST_WORD = 1000

#: vLLM's variable for the order of layers, blocks, heads and tokens in the KV cache.
LAYOUT = "VLLM_KV_CACHE_LAYOUT"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model, and the environment of every process that loads it.

    Attributes:
        path: Directory or hub name.
    """

    path: str
    environment: dict[str, str]


def find_model(config: ServeConfig) -> ModelSource:
    """Prepares the model, and sets the environment in this process, too."""
    path = models.resolve(config.model)
    environment = engine_environment(config.num_instances, path, vllm_plugins=config.vllm_plugins)
    os.environ.update(environment)
    return ModelSource(path, environment)


@dataclass(frozen=True, slots=True)
class Prepared:
    """vLLM's flags, parsed and checked; `engine_config` is vLLM's own configuration of an API server."""

    config: ServeConfig
    model: ModelSource
    flags: "ParsedFlags"
    engine_config: "VllmConfig"

    def manager_config(self, host: str, keys: CurveKeys) -> ManagerConfig:
        config = self.config
        return ManagerConfig(
            model=self.model.path,
            instances=config.instances,
            autoscale=config.pool_bounds,
            max_instances=config.max_instances,
            policies=config.policies,
            engine_args={role: self.flags.engine(role) for role in ROLES},
            placements=placements(config, {role: self.flags.workers(role) for role in ROLES}),
            host=host,
            keys=keys,
            environment=self.model.environment | self._layout(),
            stage_bytes_per_s=CPU_STAGE_BYTES_PER_S if is_cpu_build() else None,
            simulated=self._simulated(),
            replaces=config.replace,
            orphan_s=config.orphan_s,
            allow_no_migration=config.allow_no_migration,
            checks_memory=config.ray_address is None,
            instances_per_process=config.instances_per_process,
        )

    def _layout(self) -> dict[str, str]:
        """Where numbers of workers differ by role, each KV head has to be in one piece, as vLLM asks for.

        CPUs have no other layout, and latent vectors are not divided.
        """
        widths = {self.flags.workers(role) for role, number in self.config.instances.items() if number}
        divided = len(widths) > 1 and not self.engine_config.model_config.use_mla
        return {LAYOUT: os.environ.get(LAYOUT, "LBHNC")} if divided and not is_cpu_build() else {}

    def _simulated(self) -> EngineSettings | None:
        """The settings of simulated engines: they generate plain words of the model's vocabulary."""
        simulated = self.config.simulated
        if simulated is None:
            return None
        size = self.engine_config.model_config.get_vocab_size()
        words = (ord("a"), 26) if size < FIRST_WORD else (FIRST_WORD, size - FIRST_WORD)
        return replace(simulated, vocabulary=words)


def placements(config: ServeConfig, workers: Mapping[str, int]) -> dict[str, Placement]:
    """Requirements of an instance, by role; on GPUs, one for each of its workers."""
    on_gpus = not is_cpu_build() and config.engine == "vllm"
    return {
        role: Placement(
            float(workers[role]) if on_gpus else 0.0, config.resources[role], config.accelerator_type
        )
        for role in ROLES
    }


def parse(config: ServeConfig, model: ModelSource) -> Prepared:
    """Parses vLLM's flags; imports vLLM. Raises: InvalidRequestError."""
    from pd_serve.launch.engine_flags import parse as parse_flags
    from pd_serve.launch.server_flags import check_loading
    from pd_serve.observe.tracing import prepare_tracing, traces_endpoint

    prepare_tracing()
    defaults: dict[str, Any] = {
        "model": model.path,
        "served_model_name": list(config.served_model_name) or [models.served_name(config.model)],
        "host": config.host,
        "port": config.port,
    }
    if config.api_key:
        defaults["api_key"] = list(config.api_key)
    if (dtype := models.default_dtype(config.model)) is not None:
        defaults["dtype"] = dtype
    if (endpoint := traces_endpoint(os.environ)) is not None:
        defaults["otlp_traces_endpoint"] = endpoint
    role_defaults: dict[str, dict[str, Any]] = {}
    if is_cpu_build():
        defaults |= cpu_engine_defaults()
        role_defaults["prefill"] = {"max_num_batched_tokens": CPU_PREFILL_CHUNK_TOKENS}
    if budget := config.policies.decode_prompt_tokens:
        role_defaults["decode"] = {"long_prefill_token_threshold": budget}
    flags = parse_flags(list(config.flags), defaults, role_defaults)
    # Refuses what does not fit together before anything is started.
    engine_config = flags.server_config()
    check_loading(engine_config)
    by_role = {role: _engine_config(flags, role) for role, number in config.instances.items() if number}
    check_handoffs(config, [of_role for role, of_role in by_role.items() if role != "neutral"])
    return Prepared(config, model, flags, engine_config)


def _engine_config(flags: "ParsedFlags", role: str) -> "VllmConfig":
    try:
        return flags.engine_config(role)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{role} instances: {error}") from error


def check_handoffs(config: ServeConfig, engine_configs: "Sequence[VllmConfig]") -> None:
    """Refuses prefill and decode instances with settings of vLLM that do not let requests move.

    What depends on the model, the instances find out when they start.

    Raises:
        InvalidRequestError: With what to change.
    """
    from migration.vllm_engine.compatibility import unsupported_config
    from migration.vllm_engine.head_division import unsupported_widths

    hands_off = config.instances["decode"] and config.engine == "vllm" and not config.allow_no_migration
    reasons = [unsupported_config(of_role) for of_role in engine_configs] if hands_off else []
    reasons += [unsupported_widths(engine_configs)] if hands_off else []
    for why in reasons:
        if why is not None:
            raise InvalidRequestError(no_handoffs(why))
