"""Summary of a simulation: plain numbers for JSON files, tables and plots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pd_serve.simulation.arrivals import recorded_rate
from pd_serve.simulation.result import RequestRecord, Sample, SimulationResult
from router.freeness import fragmented_blocks
from router.priority import PriorityClass, priority_class
from router.slo import Slo

#: Greatest number of tokens of the prompts in each class.
PROMPT_CLASSES = {"short": 256, "medium": 2000, "long": float("inf")}

#: Keys of a summary whose values are {"mean", "p50", "p99"}, in seconds.
LATENCIES = ("prefill_s", "decode_s", "request_s", "longest_gap_s")


def summarize(
    result: SimulationResult, slo: Slo, classes: Sequence[PriorityClass] | None = None
) -> dict[str, Any]:
    """Summarizes a run. Times are in seconds; numbers without a measurement are None.

    `preemption_loss_s` is the mean over all requests. `attainment` is the share of the requests that meet the
    SLO, `goodput` that share times the arrival rate in requests/s.

    Args:
        classes: The class to report each request under; by default the one it was scheduled with.
    """
    records = result.records
    classes = classes or [priority_class(record.request.priority) for record in records]
    ended = [record for record in records if not record.failed and not record.refused]
    good = sum(slo.is_met(record.prefill_s, record.decode_s) for record in ended)
    return {
        "requests": len(records),
        **_latencies(records),
        "preemption_loss_s": result.preemption_loss_s / max(len(records), 1),
        "preemptions": result.preemptions,
        "fragmentation": _rounded(np.mean([fragmentation(s) for s in result.samples] or [0.0])),
        "migrations": result.migrations,
        "avg_instances": _rounded(result.instance_s / result.duration_s) if result.duration_s else None,
        "by_priority": {wanted.label: _of_class(records, classes, wanted) for wanted in PriorityClass},
        "by_turn": {name: _of_turns(records, name == "later") for name in ("first", "later")},
        "by_prompt": {name: _of_length(records, name) for name in PROMPT_CLASSES},
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "goodput": _rounded(good / len(records) * _arrival_rate(result)) if records else 0.0,
        "attainment": _rounded(good / len(records)) if records else None,
        "failed": sum(record.failed for record in records),
        "refused": sum(record.refused for record in records),
        "lost_tokens": sum(record.lost for record in records),
        "duplicated_tokens": sum(record.duplicated for record in records),
        "wrong_tokens": sum(record.wrong for record in records),
        "leaked_blocks": result.leaked_blocks,
        "integrity": result.integrity,
        "scalings": len(result.scaling),
        "duration_s": _rounded(result.duration_s),
        "steps": result.steps,
        "wall_s": _rounded(result.wall_s),
    }


def series(result: SimulationResult) -> dict[str, list[float]]:
    """The cluster over time: one entry per sample and name."""
    samples = result.samples
    return {
        "at_s": [round(sample.at_s, 3) for sample in samples],
        "fragmentation": [round(fragmentation(sample), 5) for sample in samples],
        "instances": [sample.instances for sample in samples],
        "running": [sample.running for sample in samples],
        "waiting": [sample.waiting for sample in samples],
    }


def fragmentation(sample: Sample) -> float:
    """Fragmented share of the cluster's KV blocks; see `fragmented_blocks`."""
    return fragmented_blocks(sample.head_of_line, sample.free) / sample.total if sample.total else 0.0


def _arrival_rate(result: SimulationResult) -> float:
    """Requests/s over the span of the arrivals; over the whole run if all arrive at once."""
    times = np.sort([record.request.arrival_s for record in result.records])
    return recorded_rate(times) if times[-1] > times[0] else len(times) / result.duration_s


def _latencies(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Latencies of the requests that did not fail; times between tokens of those with more than one."""
    served = [record for record in records if not record.failed and record.tokens]
    longer = [record for record in served if record.tokens > 1]
    return {
        "prefill_s": _distribution([record.prefill_s for record in served]),
        "decode_s": _distribution([record.decode_s for record in longer]),
        "request_s": _distribution([record.request_s for record in served]),
        "longest_gap_s": _distribution([record.longest_gap_s for record in longer]),
    }


def _of_class(
    records: Sequence[RequestRecord], classes: Sequence[PriorityClass], wanted: PriorityClass
) -> dict[str, Any]:
    chosen = [record for record, its_class in zip(records, classes, strict=True) if its_class is wanted]
    return {"requests": len(chosen), **_latencies(chosen)}


def _of_turns(records: Sequence[RequestRecord], later: bool) -> dict[str, Any]:
    """Latencies of the first turns of sessions, and of requests without one; or of the turns after these."""
    chosen = [record for record in records if (record.request.turn_of is not None) is later]
    return {"requests": len(chosen), **_latencies(chosen)}


def _of_length(records: Sequence[RequestRecord], name: str) -> dict[str, Any]:
    """Latencies of the requests whose prompts are in a class of `PROMPT_CLASSES`."""
    bounds = [0.0, *PROMPT_CLASSES.values()]
    low, high = bounds[list(PROMPT_CLASSES).index(name) :][:2]
    chosen = [record for record in records if low < record.request.prompt_tokens <= high]
    return {"requests": len(chosen), **_latencies(chosen)}


def _distribution(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, (50, 99))
    return {"mean": _rounded(np.mean(values)), "p50": _rounded(p50), "p99": _rounded(p99)}


def _rounded(value: Any) -> float:
    """Six significant digits, so that equal results compare equal in files."""
    return float(f"{float(value):.6g}")
