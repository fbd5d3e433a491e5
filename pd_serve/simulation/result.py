"""Result of a simulation: a record of each request, and samples of the cluster."""

from dataclasses import dataclass

from pd_serve.simulation.config import TraceRequest


@dataclass(slots=True)
class RequestRecord:
    """One request as observed by its client, in seconds of virtual time.

    Attributes:
        longest_gap_s: Longest time between two tokens.
        tokens: Number of received tokens.
        failed: It has ended with an error.
        refused: It could not have met its target, or a turn before it could not.
        lost, duplicated, wrong: Numbers of tokens that differ from the expected output.
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
    refused: bool = False

    @property
    def prefill_s(self) -> float:
        """Time to first token, queueing included (the paper's prefill latency; TTFT)."""
        return self.first_token_s - self.request.arrival_s

    @property
    def decode_s(self) -> float:
        """Mean time per token after the first (the paper's decode latency; TPOT). 0 with one token."""
        return (self.last_token_s - self.first_token_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def request_s(self) -> float:
        """Time from arrival to the last token (end-to-end latency)."""
        return self.last_token_s - self.request.arrival_s


@dataclass(slots=True)
class Sample:
    """The cluster at one moment, taken every second.

    Attributes:
        free, total: Numbers of KV blocks of all instances.
        head_of_line: KV blocks that the first queued request needs, for each instance with a queue.
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
    """All measurements of a run.

    Attributes:
        records: In the order of the requests.
        migrations: Numbers of committed and aborted ones, by reason.
        preemption_loss_s: Time from preemption to the end of the recompute, summed over all preemptions.
        instance_s: Lifetimes of all instances until the last token, summed.
        duration_s: Time from the first arrival to the last token.
        leaked_blocks: Number of KV blocks that were not free at rest.
        integrity: Violated invariants at rest, and unhandled errors of tasks.
        scaling: Scaling decisions: (time, decision and its reason).
        wall_s: Real duration of the run.
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
