"""What became of one request, what became of all of them, and whether that is good enough."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtests.arrival_plan import PlannedRequest
from loadtests.load_options import LIMITS, Limit
from loadtests.streamed_answer import Answer, StreamError
from router.priority import PriorityClass, priority_class

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_SLO_MISSED = 0, 1, 2, 3

#: Requests start this much late when the load generator itself is too slow to be believed.
LATE_S = 0.1


@dataclass(slots=True)
class Outcome:
    """One request as its user saw it. Times in seconds from when it was to start, not from when it did:
    a slow load generator makes them longer, never shorter.

    Attributes:
        at_s: When it was to start, since the beginning of the load.
        late_s: How much later it did.
        prompt_tokens: As the server counts; as planned where it said nothing.
        ttft_s: Time to first token.
        tpot_s: Mean time per token after the first; None with fewer than two.
        longest_gap_s: Longest time between two chunks with tokens.
        e2e_s: Until the end of the stream, or until it failed.
        gaps_s: Times between chunks with tokens (ITL).
        error: Kind of failure, None for none; `detail` is what was seen.
    """

    number: int
    api: str
    priority: int
    at_s: float
    late_s: float
    prompt_tokens: int
    tokens: int
    ttft_s: float | None
    tpot_s: float | None
    longest_gap_s: float | None
    e2e_s: float
    gaps_s: list[float]
    error: str | None = None
    detail: str = ""

    def is_good(self, slo: Sequence[Limit]) -> bool:
        """It did not fail, and everything that it has a time for is within the limits."""
        times = [(getattr(self, LIMITS[limit.name]), limit.most_s) for limit in slo]
        return self.error is None and all(value is None or value <= most for value, most in times)


def outcome(
    request: PlannedRequest,
    answer: Answer,
    start_s: float,
    began_s: float,
    end_s: float,
    error: StreamError | None,
) -> Outcome:
    """Args:
    start_s, began_s, end_s: When it was to start, did start and ended, on the clock of the answer.
    """
    times = answer.times_s
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    more = len(answer.token_ids) > 1 and len(times) > 1
    return Outcome(
        number=request.number,
        api=request.api,
        priority=request.priority,
        at_s=request.at_s,
        late_s=began_s - start_s,
        prompt_tokens=(answer.usage or {}).get("prompt_tokens", request.prompt_tokens),
        tokens=len(answer.token_ids),
        ttft_s=times[0] - start_s if times else None,
        tpot_s=(times[-1] - times[0]) / (len(answer.token_ids) - 1) if more else None,
        longest_gap_s=max(gaps, default=None),
        e2e_s=end_s - start_s,
        gaps_s=gaps,
        error=error.kind if error else None,
        detail=error.detail if error else "",
    )


def summarize(outcomes: Sequence[Outcome], slo: Sequence[Limit], num_planned: int) -> dict[str, Any]:
    """All numbers of a run. Latencies are of the requests that did not fail; times in milliseconds.

    `goodput` counts requests within all limits: their share of all that were planned, and how many there
    were per second from the first start to the last end.
    """
    served = [one for one in outcomes if one.error is None]
    good = sum(one.is_good(slo) for one in outcomes)
    duration_s = max((one.at_s + one.e2e_s for one in outcomes), default=0.0)
    return {
        "planned": num_planned,
        "ended": len(outcomes),
        "failed": len(outcomes) - len(served),
        "failures": dict(Counter(one.error for one in outcomes if one.error is not None)),
        "duration_s": round(duration_s, 3),
        "requests_per_s": _per_s(len(served), duration_s),
        "output_tokens_per_s": _per_s(sum(one.tokens for one in served), duration_s),
        "latencies_ms": _latencies(served),
        "by_priority_ms": {
            wanted.label: _latencies([one for one in served if priority_class(one.priority) is wanted])
            for wanted in PriorityClass
        },
        "goodput": {
            "slo_s": {limit.name: limit.most_s for limit in slo},
            "good": good,
            "share": round(good / num_planned, 4) if num_planned else None,
            "requests_per_s": _per_s(good, duration_s),
        },
        "late_start_ms": _distribution([one.late_s for one in outcomes]),
    }


def exit_code(summary: dict[str, Any], least_goodput: float | None) -> int:
    """0 if all is well, 1 if a request failed or is missing, 3 if the share of good ones is too small.

    Args:
        least_goodput: Share; None asks for none.
    """
    if summary["failed"] or summary["ended"] < summary["planned"] or not summary["planned"]:
        return EXIT_FAILED
    if least_goodput is not None and summary["goodput"]["share"] < least_goodput:
        return EXIT_SLO_MISSED
    return EXIT_OK


def as_row(outcome: Outcome) -> dict[str, Any]:
    """For JSON: without the single gaps, which are many."""
    row = {name: value for name, value in asdict(outcome).items() if name != "gaps_s"}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def _latencies(served: Sequence[Outcome]) -> dict[str, dict[str, float | None]]:
    values = {
        name: [value for one in served if (value := getattr(one, attribute)) is not None]
        for name, attribute in LIMITS.items()
    }
    values["itl"] = [gap for one in served for gap in one.gaps_s]
    return {name: _distribution(values[name]) for name in ("ttft", "tpot", "itl", "gap", "e2e")}


def _distribution(values_s: Sequence[float]) -> dict[str, float | None]:
    if not values_s:
        return {"mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    p50, p90, p99 = np.percentile(values_s, (50, 90, 99))
    figures = {"mean": np.mean(values_s), "p50": p50, "p90": p90, "p99": p99, "max": max(values_s)}
    return {name: round(float(value) * 1e3, 3) for name, value in figures.items()}


def _per_s(count: int, duration_s: float) -> float:
    return round(count / duration_s, 3) if duration_s > 0 else 0.0
