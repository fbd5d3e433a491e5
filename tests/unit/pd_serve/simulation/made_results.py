"""Results made by hand, in place of a simulation's."""

from collections.abc import Sequence

from pd_serve.simulation.config import RequestRecord, Sample, SimulationResult, TraceRequest


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
