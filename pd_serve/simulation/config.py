"""What a simulation is made of, and what comes out: plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pd_serve.simulated_engine.settings import EngineSettings
from router.scaling import PoolBounds

#: What a request of the paper takes from its client to an engine and its first token back, besides queueing
#: and computing. Fitted, once for all figures, to its prefill latencies where nothing queues.
FITTED_FRONT_END_S = 0.13


class TraceRequest(msgspec.Struct, frozen=True):
    """One request of a workload.

    Attributes:
        arrival_s: Since the beginning.
        priority: As in vLLM: lower is earlier, 0 is normal, -1 is high.
        segments: Contents of the prompt's first `SEGMENT_TOKENS` tokens, the next, and so on: equal
            numbers at equal places after equal beginnings are equal tokens. Empty: shares nothing.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    segments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Links between instances.

    Attributes:
        message_latency_s: One way, for control messages and tokens.
        kv_latency_s: Before the first byte of a copy. With the speed, fitted to the paper's blocking copies.
        kv_bytes_per_s: Speed of one instance's link, in each direction; shared by the copies on it.
    """

    message_latency_s: float = 0.0005
    kv_latency_s: float = 0.010
    kv_bytes_per_s: float = 2.48e9


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """One run. The result is a function of it.

    Attributes:
        instances: Number by role ("prefill", "decode", "neutral") at the beginning.
        policy: Name of a policy set; see `router.policies`.
        overrides: Settings of the policy set to change, by name.
        engines: By role; "neutral" is the default of the others.
        autoscale: By role; empty for a fixed cluster.
        start_instance_s: How long a new instance takes until it serves.
        front_end_s: How long requests take to the router; part of their latency.
        max_migrations: Per instance and direction, at a time.
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
    seed: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it. Times in seconds of virtual time.

    Attributes:
        token_gaps_max_s: Longest time between two tokens.
        tokens: Tokens received.
        lost, duplicated, wrong: Against what its prompt makes the simulated model say.
    """

    request: TraceRequest
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    tokens: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    failed: bool = False

    @property
    def prefill_s(self) -> float:
        """Time to first token, queueing included (the paper's prefill latency; TTFT)."""
        return self.first_token_s - self.request.arrival_s

    @property
    def decode_s(self) -> float:
        """Mean time of the tokens after the first (the paper's decode latency; TPOT). 0 with one token."""
        return (self.last_token_s - self.first_token_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def request_s(self) -> float:
        """From arrival to the last token (E2E)."""
        return self.last_token_s - self.request.arrival_s


@dataclass(slots=True)
class Sample:
    """The cluster at one moment, taken every second.

    Attributes:
        free, total: KV blocks over all instances.
        head_of_line: Blocks that each first queued request needs, where there is one.
    """

    at_s: float
    instances: int
    running: int
    waiting: int
    free: int
    total: int
    head_of_line: list[int]


@dataclass(slots=True)
class SimulationResult:
    """Attributes:
    records: In the order of the requests.
    migrations: Committed and aborted ones, by reason.
    preemption_loss_s: Time from being preempted until recomputed, summed over all preemptions.
    instance_s: Lifetime of all instances together, while there was anything to do.
    duration_s: From the first arrival to the last token.
    scaling: (time, what was done and why) per scaling decision.
    """

    records: list[RequestRecord]
    samples: list[Sample]
    migrations: dict[str, dict[str, int]]
    preemptions: int
    preemption_loss_s: float
    instance_s: float
    duration_s: float
    leaked_blocks: int
    integrity: list[str]
    scaling: list[tuple[float, str]]
    steps: int
    wall_s: float
