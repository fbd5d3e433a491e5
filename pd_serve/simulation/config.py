"""Configuration of a simulation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from pd_serve.simulated_engine.settings import EngineSettings
from router.policies import PolicySet, policy_set
from router.scaling import PoolBounds
from router.slo import NO_SLO, Slo

#: Time from the client to an engine and back with the first token, without queueing and computing. Fitted
#: once for all figures to the paper's prefill latencies without queueing.
FITTED_FRONT_END_S = 0.13


Moves = Literal["live", "none", "recompute"]


class TraceRequest(msgspec.Struct, frozen=True):
    """One request of a workload.

    Attributes:
        arrival_s: Seconds since the beginning.
        priority: As in vLLM: lower is earlier, 0 is normal, -1 is high.
        segments: Content id of each `SEGMENT_TOKENS` tokens of the prompt. Prompts whose first ids are equal
            share these tokens. Empty: the prompt shares nothing.
        turn_of: Number of the request whose prompt and output this prompt begins with; None for the first
            turn of a session. It arrives `arrival_s` seconds after the last token of that one.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    segments: tuple[int, ...] = ()
    turn_of: int | None = None


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Links between instances.

    Attributes:
        message_latency_s: One-way latency of control messages and tokens.
        kv_latency_s: Latency of a copy. The defaults are the paper's; see `hardware.Hardware`.
        kv_bytes_per_s: Bandwidth of one instance's link in each direction; its copies share it.
        nodes: Machines, over which the instances of each role are spread in turn.
        far_kv_bytes_per_s: Bandwidth of copies between machines; 0 for the same.
    """

    message_latency_s: float = 0.0005
    kv_latency_s: float = 0.010
    kv_bytes_per_s: float = 2.48e9
    nodes: int = 1
    far_kv_bytes_per_s: float = 0.0

    def node_of(self, instance_id: str) -> str:
        """The machine of an instance."""
        return f"node-{int(instance_id.rpartition('-')[2]) % self.nodes}"

    def bytes_per_s(self, source: str, destination: str) -> float:
        """Bandwidth of copies between two instances."""
        is_far = self.nodes > 1 and self.node_of(source) != self.node_of(destination)
        return self.far_kv_bytes_per_s or self.kv_bytes_per_s if is_far else self.kv_bytes_per_s


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Configuration of one run, which determines its result.

    Attributes:
        instances: Number at the start, by role ("prefill", "decode", "neutral").
        policy: Name of a policy set; see `router.policies`.
        overrides: Changed settings of the policy set, by name.
        engines: Settings by role; "neutral" is the default of the other roles.
        autoscale: Bounds by role; empty for a fixed cluster.
        start_instance_s: Time until a new instance serves.
        front_end_s: Time from a client to the request router; part of the request's latency.
        max_migrations: Maximum number of migrations at a time, per instance and direction.
        moves: "live"; "none" for engines that cannot move requests, so that these decode where they were
            prefilled; "recompute" for such engines whose requests start again on a decode instance after
            their first token.
        slo: Targets that every request brings: they order the queues, and what cannot meet the first one is
            refused.
        orphan_s: Seconds that requests go on after their API server has left.
        every_step: Each step of an engine is an event of its own, as for faults between two steps. Without,
            a run of decode steps that nothing interrupts is one event, with the same result.
    """

    requests: Sequence[TraceRequest]
    instances: dict[str, int]
    policy: str
    engines: dict[str, EngineSettings]
    overrides: dict[str, float | int | str] = field(default_factory=dict)
    network: NetworkSettings = NetworkSettings()
    autoscale: dict[str, PoolBounds] = field(default_factory=dict)
    start_instance_s: float = 10.0
    front_end_s: float = 0.0
    max_migrations: int = 64
    moves: Moves = "live"
    slo: Slo = NO_SLO
    orphan_s: float = 0.0
    every_step: bool = False
    seed: int = 0

    @property
    def policies(self) -> PolicySet:
        """Raises: PolicyError: there is no such set or setting."""
        return policy_set(self.policy, **self.overrides)
