"""What a manager is started with."""

from dataclasses import dataclass, field
from typing import Any

from pd_serve.comm.wire import CurveKeys
from pd_serve.platform.placement import Placement
from pd_serve.simulated_engine.settings import EngineSettings
from router.scaling import PoolBounds
from router.settings import PolicySet


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerConfig:
    """What instances and the scheduler are started with. Plain values: it travels through Ray.

    Attributes:
        instances: Number at the start, by role.
        max_instances: The scheduler gets never more than this number.
        engine_args: Arguments of vLLM's `AsyncEngineArgs`, by role.
        placements: What instances need of their machine, by role.
        host: Address that sockets bind to; if it is not loopback, each binds to its own machine's.
        checks_memory: All of them share this machine: a start is refused if its memory does not suffice.
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
    checks_memory: bool = False

    def first_names(self) -> list[tuple[str, str]]:
        """Ids and roles of the instances at the start."""
        return [
            (f"{role}-{number}", role) for role, count in self.instances.items() for number in range(count)
        ]
