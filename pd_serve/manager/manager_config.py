"""Configuration of a manager."""

from dataclasses import dataclass, field
from typing import Any

from pd_serve.comm.wire import CurveKeys
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.platform.memory import check_memory
from pd_serve.platform.placement import Placement
from pd_serve.simulated_engine.settings import EngineSettings
from router.scaling import PoolBounds
from router.settings import PolicySet


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerConfig:
    """Configuration of a cluster's instances and scheduler. Plain values: Ray serializes it.

    Attributes:
        instances: Number at the start, by role.
        max_instances: Maximum number of instances that the scheduler may have started.
        engine_args: Arguments of vLLM's `AsyncEngineArgs`, by role.
        placements: Resources of an instance, by role.
        host: Loopback, or an address in place of which each process binds to its own machine's.
        orphan_s: See `pd_serve.instance.orphans`.
        allow_no_migration: Prefill and decode instances start even if their engines cannot move requests.
        checks_memory: All instances run on this machine; refuses a start if its memory does not suffice.
        instances_per_process: Simulated instances that share a process.
    """

    model: str
    instances: dict[str, int]
    autoscale: dict[str, PoolBounds]
    max_instances: int
    policies: PolicySet
    engine_args: dict[str, dict[str, Any]]
    placements: dict[str, Placement]
    host: str
    keys: CurveKeys
    environment: dict[str, str] = field(default_factory=dict)
    stage_bytes_per_s: float | None = None
    simulated: EngineSettings | None = None
    replaces: bool = True
    orphan_s: float = 0.0
    allow_no_migration: bool = False
    checks_memory: bool = False
    instances_per_process: int = 1

    def instance(self, name: str, role: str) -> InstanceConfig:
        return InstanceConfig(
            name,
            role,
            self.engine_args[role],
            self.host,
            self.keys,
            self.environment,
            self.stage_bytes_per_s,
            self.simulated and self.simulated.of_role(role, self.policies.decode_prompt_tokens),
            orphan_s=self.orphan_s,
            itl_target_s=self.policies.itl_target_s,
            needs_migration=role != "neutral" and not self.allow_no_migration,
        )

    def check_memory(self, name: str, role: str) -> None:
        """Raises: PdServeError: this machine's memory does not suffice for this instance."""
        if self.checks_memory and (name, role) not in self.first_names():  # those are checked together
            check_memory(1, self.engine_args[role], self.model, simulated=self.simulated is not None)

    def first_names(self) -> list[tuple[str, str]]:
        """Ids and roles of the instances at the start."""
        return [
            (f"{role}-{number}", role) for role, count in self.instances.items() for number in range(count)
        ]
