"""The settings of one service, from the command line, the arguments of Ray Serve, or the environment.

Each field is one flag: its name, type, default, help text, group and checks. The command line
(`pd_serve.cli.flags`) and the arguments of Ray Serve (`pd_serve.launch.ray_serve`) are derived from the
fields. Each can be set in the environment, too, as PD_SERVE_ and its name. vLLM's flags pass through `flags`.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from pd_serve.errors import InvalidRequestError
from pd_serve.models.catalog import DEFAULT_MODEL
from pd_serve.setting_types import (
    MAX_INSTANCES,
    Bounds,
    Keys,
    Limits,
    Port,
    Resources,
    Targets,
    Words,
    did_you_mean,
    message_of,
    parse_settings,
    refuse_misspelt,
)
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import ROLES
from router.policies import PolicySet, policy_set
from router.rate_limits import KeyLimits
from router.scaling import PoolBounds

DEFAULT_POLICY = "llumnix"
DEFAULT_COST_MODEL = "a10-llama-7b"

ENVIRONMENT_PREFIX = "PD_SERVE_"

#: Default number of API servers. Each makes 6,000 to 10,000 tokens/s of one core.
CORES_PER_API_SERVER, MAX_DEFAULT_API_SERVERS = 8, 8

#: Settings that a Ray Serve application leaves to Ray Serve, or reads from files only.
COMMAND_LINE_ONLY = frozenset(
    ("host", "port", "ray_address", "api_key", "admin_key", "log_format", "max_connections")
) | {"cluster_secret", "limits_by_key", "names_by_key"}

GROUPS = ("Instances", "Scheduling", "API", "Security", "Cluster", "vLLM")
INSTANCES, SCHEDULING, API, SECURITY, CLUSTER, VLLM = GROUPS


def _flag(
    group: str, default: Any, help: str, *, metavar: str | None = None, shown: str | None = None, **field: Any
) -> Any:
    """One setting.

    Args:
        group: Its heading in `pd-serve serve --help`.
        metavar: What the help shows for the value, if not its type.
        shown: What the help shows as the default, if not the default.
        field: Bounds of the value, and what else pydantic's `Field` takes.
    """
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "shown": shown}
    return Field(default, description=help, json_schema_extra=extra, **field)


class ServeConfig(BaseSettings):
    """The settings of one service.

    Raises:
        InvalidRequestError: On construction, with one line that says what to change.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str = DEFAULT_MODEL
    flags: Words = ()
    cluster_secret: bytes | None = Field(None, repr=False)
    limits_by_key: dict[str, KeyLimits] = Field({}, repr=False)
    names_by_key: dict[str, str] = Field({}, repr=False)

    prefill: int | None = _flag(INSTANCES, None, "Prefill instances.", shown="1", ge=0)
    decode: int | None = _flag(INSTANCES, None, "Decode instances.", shown="2", ge=0)
    neutral: int | None = _flag(
        INSTANCES, None, "Instances that prefill and decode, without disaggregation.", shown="0", ge=0
    )
    autoscale_prefill: Bounds = _flag(
        INSTANCES, None, "Scale the number of prefill instances automatically.", metavar="MIN:MAX"
    )
    autoscale_decode: Bounds = _flag(
        INSTANCES, None, "Scale the number of decode instances automatically.", metavar="MIN:MAX"
    )
    autoscale: Bounds = _flag(
        INSTANCES, None, "Scale the number of neutral instances automatically.", metavar="MIN:MAX"
    )
    replace: bool = _flag(INSTANCES, True, "Start a new instance when one has died.")
    allow_no_migration: bool = _flag(
        INSTANCES, False, "Start prefill and decode instances even if their engine cannot move requests."
    )
    engine: Literal["vllm", "simulated"] = _flag(
        INSTANCES, "vllm", "Engine of the instances: vLLM, or a simulation that generates random words."
    )
    cost_model: str = _flag(
        INSTANCES,
        DEFAULT_COST_MODEL,
        "Hardware of simulated engines: a name, or a CSV file of step times.",
    )
    instances_per_process: int = _flag(
        INSTANCES, 1, "Simulated instances that share a process, so that many run on few cores.", ge=1
    )

    policy: str = _flag(
        SCHEDULING, DEFAULT_POLICY, "Policy set that places and moves requests; see pd-serve policies."
    )
    set: Words = _flag(
        SCHEDULING, (), "Change a setting of the policy; may be repeated.", metavar="KEY=VALUE"
    )
    slo: Targets = _flag(
        SCHEDULING,
        None,
        "Targets of requests without their own (x-slo-ttft-ms, x-slo-itl-ms): time to first token, and mean"
        " time per later token. They set the order of the queue and the metrics; only a request that brings"
        " its own ttft is refused, with 429, when it cannot be met.",
        metavar="ttft=TIME,itl=TIME",
    )
    fair_share: bool = _flag(
        SCHEDULING,
        False,
        "Of the API keys whose requests wait, the one served the fewest tokens goes next.",
    )
    max_waiting_requests: int = _flag(
        SCHEDULING, 512, "Requests that may wait for a first token before others get 429.", ge=0
    )

    host: str = _flag(API, "127.0.0.1", "Address to serve on.")
    port: Port = _flag(API, 8000, "Port to serve on; 0 for any free one.", ge=0, le=65535)
    api_servers: int | None = _flag(
        API,
        None,
        "API server processes, which share the port.",
        shown=f"one for {CORES_PER_API_SERVER} cores, at most {MAX_DEFAULT_API_SERVERS}",
        ge=1,
        le=256,
    )
    service_name: str = _flag(
        API, "pd-serve", "Name of the service in metrics and on the live page, to tell several apart."
    )
    served_model_name: Words = _flag(
        API,
        (),
        "Name of the model in the API; with several names, the first one is in the answers.",
        metavar="NAME...",
        shown="MODEL",
    )
    max_body_bytes: int = _flag(
        API, 32 * 2**20, "Length of a request's body; longer ones get 413.", ge=1024
    )  # fits a prompt of millions of tokens, or some large pictures
    max_connections: int = _flag(API, 10_000, "Connections of clients at a time; further ones get 503.", ge=1)
    orphan_s: float = _flag(
        API,
        30.0,
        "Seconds that requests go on after their API server has died, until their clients ask another one.",
        ge=0,
        le=600,
    )
    log_format: Literal["text", "json"] = _flag(API, "text", "Format of log lines.")

    api_key: Keys = _flag(
        SECURITY,
        (),
        "Key that clients must send; may be repeated.",
        metavar="KEY",
        repr=False,
        validation_alias=AliasChoices("api_key", f"{ENVIRONMENT_PREFIX}API_KEY", "VLLM_API_KEY"),
    )
    api_key_file: Path | None = _flag(
        SECURITY,
        None,
        "File of such keys, one a line, each perhaps with a name and limits: KEY name=alice,rpm=60.",
    )
    key_limits: Limits = _flag(
        SECURITY,
        None,
        "Requests and tokens per minute of each API key without its own limits, or of all clients together"
        " if there are no keys; further requests get 429.",
        metavar="rpm=N,tpm=N",
    )
    admin_key: str | None = _flag(
        SECURITY, None, "Key for /cluster, which API keys then do not open.", metavar="KEY", repr=False
    )
    admin_key_file: Path | None = _flag(SECURITY, None, "File of that key.")
    cluster_secret_file: Path | None = _flag(
        SECURITY,
        None,
        "File of the secret that the processes share, or $PD_SERVE_CLUSTER_SECRET.",
        shown="a random one",
    )

    ray_address: str | None = _flag(CLUSTER, None, "Join this Ray cluster instead of starting a local one.")
    prefill_resources: Resources = _flag(
        CLUSTER, None, "Custom resources of Ray that each prefill instance needs.", metavar="JSON"
    )
    decode_resources: Resources = _flag(CLUSTER, None, "The same for each decode instance.", metavar="JSON")
    neutral_resources: Resources = _flag(CLUSTER, None, "The same for each neutral instance.", metavar="JSON")
    accelerator_type: str | None = _flag(
        CLUSTER, None, "Only on machines with this accelerator, under Ray's name for it."
    )

    vllm_plugins: bool = _flag(
        VLLM, False, "Load vLLM's plugins, at a cost in start-up time. $VLLM_PLUGINS selects some by name."
    )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise InvalidRequestError("; ".join(map(message_of, error.errors()))) from None
        except SettingsError as error:
            raise InvalidRequestError(f"environment: {error}") from None
        refuse_misspelt(ENVIRONMENT_PREFIX, type(self).model_fields)
        self._check()

    @classmethod
    def of_ray_serve(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of a Ray Serve application: the flags' names without the dashes.

        Raises:
            InvalidRequestError: There is no such argument, or a value is wrong.
        """
        known = [name for name in cls.model_fields if name not in COMMAND_LINE_ONLY]
        for name in arguments:
            if name not in known:
                hint = did_you_mean(str(name), known)
                raise InvalidRequestError(f"the application has no argument {name!r}{hint}")
        return cls(**{**arguments, "ray_address": "auto"})

    def _check(self) -> None:
        prefill, decode, neutral = (self.instances[role] for role in ROLES)
        if not prefill and not neutral:
            raise InvalidRequestError("no instance would take requests: give --prefill or --neutral")
        if prefill and not decode and not neutral:
            raise InvalidRequestError(
                "prefill instances need decode instances: give --decode, or --neutral only"
            )
        if decode and not prefill:
            raise InvalidRequestError("decode instances need prefill instances: give --prefill")
        for role, (least, most) in self.pool_bounds.items():
            if not least <= self.instances[role] <= most:
                raise InvalidRequestError(
                    f"{self.instances[role]} {role} instances at the start are not within {least}:{most}"
                )
        if self.max_instances > MAX_INSTANCES:
            raise InvalidRequestError(f"{self.max_instances} instances are more than {MAX_INSTANCES}")
        if "" in self.served_model_name:
            raise InvalidRequestError("--served-model-name: a name is empty")
        if self.instances_per_process > 1:
            if self.engine != "simulated":
                raise InvalidRequestError("--instances-per-process: only simulated instances share a process")
            if any(self.resources.values()) or self.accelerator_type is not None:
                raise InvalidRequestError(
                    "--instances-per-process: instances that share a process have no resources of their own"
                )
        _ = self.policies, self.simulated  # their names are checked before anything starts

    @property
    def pool_bounds(self) -> dict[str, PoolBounds]:
        """Bounds by role; a role without them does not scale."""
        bounds = zip(ROLES, (self.autoscale_prefill, self.autoscale_decode, self.autoscale), strict=True)
        return {role: both for role, both in bounds if both is not None}

    @property
    def instances(self) -> dict[str, int]:
        """Number of instances at the start, by role.

        Without numbers: 1 prefill and 2 decode, or neutral ones only if the settings name those, as near to
        that as the bounds allow.
        """
        with_neutral = bool(self.neutral) or (self.neutral is None and self.autoscale is not None)
        defaults = {"neutral": 1} if with_neutral else {"prefill": 1, "decode": 2}
        numbers = {}
        for role, given in zip(ROLES, (self.prefill, self.decode, self.neutral), strict=True):
            least, most = self.pool_bounds.get(role, PoolBounds(0, sys.maxsize))
            numbers[role] = min(max(defaults.get(role, 0), least), most) if given is None else given
        return numbers

    @property
    def instance_roles(self) -> list[tuple[str, str]]:
        """(instance id, role) of every instance at the start."""
        return [(f"{role}-{i}", role) for role in ROLES for i in range(self.instances[role])]

    @property
    def num_instances(self) -> int:
        """Number of instances at the start."""
        return sum(self.instances.values())

    @property
    def max_instances(self) -> int:
        """Largest number of instances at a time."""
        return sum(self.pool_bounds[r].most if r in self.pool_bounds else self.instances[r] for r in ROLES)

    def num_api_servers(self, cores: int) -> int:
        """Number of API server processes on a machine with this number of cores."""
        default = min(max(cores // CORES_PER_API_SERVER, 1), MAX_DEFAULT_API_SERVERS)
        return self.api_servers or default

    @property
    def resources(self) -> dict[str, dict[str, float]]:
        """Custom resources of Ray that an instance needs, by role."""
        by_role = zip(
            ROLES, (self.prefill_resources, self.decode_resources, self.neutral_resources), strict=True
        )
        return {role: amounts or {} for role, amounts in by_role}

    @property
    def limits_of_accounts(self) -> list[KeyLimits]:
        """Limits by account: one for each API key, or one for all clients."""
        general = self.key_limits or KeyLimits()
        return [self.limits_by_key.get(key, general) for key in self.api_key] or [general]

    @property
    def account_names(self) -> list[str]:
        """What metrics call each API key: its name, or the beginning of its hash."""
        return [self.names_by_key.get(key) or sha256(key.encode()).hexdigest()[:8] for key in self.api_key]

    @property
    def policies(self) -> PolicySet:
        """The policy set of the scheduler and the API servers."""
        try:
            return policy_set(self.policy, **parse_settings(self.set))
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None

    @property
    def simulated(self) -> EngineSettings | None:
        """The simulated engine, which batches as vLLM does; None for vLLM itself."""
        if self.engine == "vllm":
            return None
        from pd_serve.simulated_engine.hardware import hardware

        engine = hardware(self.cost_model).engine
        return replace(engine, chunk_tokens=engine.chunk_tokens or 2048, prefix_caching=True)
