"""The outcome of one request, the numbers of a whole load, and its exit code."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.latency_statistics import statistics_ms
from loadtests.options import LIMITS, Limit
from loadtests.workload import PlannedRequest
from router.priority import PriorityClass, priority_class

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_SLO_MISSED = 0, 1, 2, 3

#: A p99 delay of the starts above this means that the load generator is too slow for the load.
LATE_S = 0.1


@dataclass(slots=True)
class Outcome:
    """One request as its user saw it.

    Times are in seconds from the planned start of the request, not from the actual one: a slow load generator
    makes them longer, never shorter.

    Attributes:
        tokens: Number of output tokens received.
        ttft_s: Time to first token; None without tokens.
        gaps_s: Times between two chunks with tokens (ITL).
        e2e_s: Time until the stream ended or failed.
        at_s: Planned start, since the beginning of the load.
        late_s: Delay of the actual start.
        prompt_tokens: As the server counts; as planned if the server reported nothing.
        error: Kind of failure, None for none; `detail` is what was received.
        is_later_turn: Of a session, after its first one.
    """

    number: int
    tokens: int
    ttft_s: float | None
    gaps_s: Sequence[float]
    e2e_s: float
    api: str = "completions"
    priority: int = 0
    at_s: float = 0.0
    late_s: float = 0.0
    prompt_tokens: int = 0
    error: str | None = None
    detail: str = ""
    is_later_turn: bool = False

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two tokens or chunks."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.tokens > 1 and self.gaps_s else None

    @property
    def longest_gap_s(self) -> float | None:
        """Longest time between two chunks with tokens."""
        return max(self.gaps_s, default=None)

    def is_good(self, slo: Sequence[Limit]) -> bool:
        """Whether the request did not fail and each of its latencies is within its limit."""
        times = [(getattr(self, LIMITS[limit.name]), limit.most_s) for limit in slo]
        return self.error is None and all(value is None or value <= most for value, most in times)


def outcome(
    request: PlannedRequest,
    answer: StreamedAnswer,
    start_s: float,
    began_s: float,
    end_s: float,
    error: StreamError | None,
) -> Outcome:
    """The outcome of a request and its answer.

    Args:
        start_s, began_s, end_s: Planned start, actual start and end, on the clock of the answer.
    """
    times = answer.times_s
    return Outcome(
        number=request.number,
        tokens=len(answer.token_ids),
        ttft_s=times[0] - start_s if times else None,
        gaps_s=[later - earlier for earlier, later in itertools.pairwise(times)],
        e2e_s=end_s - start_s,
        api=request.api,
        priority=request.priority,
        at_s=request.at_s,
        late_s=began_s - start_s,
        prompt_tokens=(answer.usage or {}).get("prompt_tokens", request.prompt_tokens),
        error=error.kind if error else None,
        detail=error.detail if error else "",
    )


def latencies_s(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """All times of the requests that did not fail, by name: ttft, tpot, itl, gap (the longest), e2e."""
    served = [one for one in outcomes if one.error is None]
    times = {
        name: [value for one in served if (value := getattr(one, attribute)) is not None]
        for name, attribute in LIMITS.items()
    }
    times["itl"] = [gap for one in served for gap in one.gaps_s]
    return {name: times[name] for name in ("ttft", "tpot", "itl", "gap", "e2e")}


def summarize(outcomes: Sequence[Outcome], slo: Sequence[Limit], num_planned: int) -> dict[str, Any]:
    """All numbers of a load. Latencies are of the requests that did not fail, in milliseconds.

    `goodput` counts requests within all limits: their share of all planned requests, and their number per
    second from the first start to the last end.
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
        "latencies_ms": _latencies_ms(served),
        "by_priority_ms": {
            wanted.label: _latencies_ms([one for one in served if priority_class(one.priority) is wanted])
            for wanted in PriorityClass
        },
        "goodput": {
            "slo_s": {limit.name: limit.most_s for limit in slo},
            "good": good,
            "share": round(good / num_planned, 4) if num_planned else None,
            "requests_per_s": _per_s(good, duration_s),
        },
        "late_start_ms": statistics_ms([one.late_s for one in outcomes]),
    }


def exit_code(summary: dict[str, Any], least_goodput: float | None) -> int:
    """0 for success, 1 if a request failed or is missing, 3 if the share of good requests is too small.

    Args:
        least_goodput: The least share of good requests; None for no limit.
    """
    if summary["failed"] or summary["ended"] < summary["planned"] or not summary["planned"]:
        return EXIT_FAILED
    if least_goodput is not None and summary["goodput"]["share"] < least_goodput:
        return EXIT_SLO_MISSED
    return EXIT_OK


def as_row(outcome: Outcome) -> dict[str, Any]:
    """A row for JSON, without the single gaps: they are many."""
    row = {name: value for name, value in asdict(outcome).items() if name != "gaps_s"}
    row |= {"tpot_s": outcome.tpot_s, "longest_gap_s": outcome.longest_gap_s}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def _latencies_ms(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | None]]:
    return {name: statistics_ms(values) for name, values in latencies_s(outcomes).items()}


def _per_s(count: int, duration_s: float) -> float:
    return round(count / duration_s, 3) if duration_s > 0 else 0.0
