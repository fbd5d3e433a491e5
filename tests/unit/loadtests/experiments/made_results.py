"""Results made by hand, in place of a simulation's."""

from collections.abc import Callable, Sequence

from pd_serve.simulation.config import SimulationConfig, TraceRequest
from pd_serve.simulation.result import RequestRecord, Sample, SimulationResult


def record(
    prefill_s: float, decode_s: float, tokens: int = 11, arrival_s: float = 0.0, priority: int = 0
) -> RequestRecord:
    first = arrival_s + prefill_s
    return RequestRecord(
        TraceRequest(arrival_s, 100, tokens, priority),
        first_token_s=first,
        last_token_s=first + decode_s * (tokens - 1),
        longest_gap_s=2 * decode_s,
        tokens=tokens,
    )


def result(
    records: Sequence[RequestRecord], samples: Sequence[Sample] = (), duration_s: float = 10.0
) -> SimulationResult:
    return SimulationResult(
        records=list(records),
        samples=list(samples),
        migrations={"balance": {"committed": 3}},
        preemptions=2,
        preemption_loss_s=6.0,
        instance_s=duration_s * 12.5,
        duration_s=duration_s,
        leaked_blocks=0,
        integrity=[],
        scaling=[(3.0, "add one: freeness 2 < 10")],
        steps=100,
        wall_s=0.5,
    )


def stand_in(
    config: SimulationConfig, on_progress: Callable[[int, int], None] | None = None
) -> SimulationResult:
    """Every request takes a second to its first token."""
    if on_progress is not None:
        on_progress(len(config.requests), len(config.requests))
    records = [record(1.0, 0.05, arrival_s=r.arrival_s, priority=r.priority) for r in config.requests]
    return result(records, [Sample(float(k), 16, 5, 1, 50, 100, [10]) for k in range(3)])
