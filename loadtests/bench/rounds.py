"""Measured rounds of a benchmark and their numbers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtests.latency_statistics import statistics_ms, to_ms
from loadtests.outcome import Outcome, latencies_s
from pd_serve.errors import PdServeError


@dataclass(slots=True)
class Round:
    """One server, or one arm, under one round's load.

    Attributes:
        cpu_s: CPU time of the measured processes.
        load_average: Of the machine at the start, over one minute.
    """

    seconds: float
    cpu_s: float
    load_average: float
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(one.tokens for one in self.outcomes)

    def check(self, name: str) -> None:
        """Raises: PdServeError: A request failed; the message has the server's `name`."""
        failed = next((one.error for one in self.outcomes if one.error is not None), None)
        if failed is not None:
            raise PdServeError(f"a request to {name} failed: {failed}")


@dataclass(frozen=True, slots=True)
class RoundMedians:
    """Numbers of one round without failures.

    Attributes:
        ttft_ms, itl_ms: Medians over the requests, and over the gaps between tokens.
        cpu_ms_per_token: CPU time of all processes of the server per output token. It is steadier than times
            on a busy machine, and determines the throughput where cores are short.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    cpu_ms_per_token: float

    @classmethod
    def of(cls, one: Round) -> "RoundMedians":
        times = latencies_s(one.outcomes)
        return cls(
            output_tokens_per_s=round(one.num_tokens / one.seconds, 2),
            ttft_ms=to_ms(statistics.median(times["ttft"])),
            itl_ms=to_ms(statistics.median(times["itl"])),
            cpu_ms_per_token=round(one.cpu_s / one.num_tokens * 1e3, 4),
        )


#: Names in reports of the latencies of `loadtests.outcome`.
REPORTED = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "gap": "longest_gap"}


def summarize_rounds(rounds: Sequence[Round]) -> dict[str, float]:
    """Numbers over all requests of all rounds; times in ms. Failed requests count as failures only."""
    outcomes = [outcome for one in rounds for outcome in one.outcomes]
    failures = sum(outcome.error is not None for outcome in outcomes)
    result: dict[str, float] = {"requests": len(outcomes), "failures": failures}
    for name, values in latencies_s(outcomes).items():
        if name in REPORTED:
            found = statistics_ms(values, ("p50", "p99", *(("max",) if name == "gap" else ())))
            result |= {
                f"{REPORTED[name]}_{part}_ms": value for part, value in found.items() if value is not None
            }
    later = latencies_s([outcome for outcome in outcomes if outcome.is_later_turn])["ttft"]
    found = statistics_ms(later, ("p50", "p99"))
    result |= {f"later_ttft_{part}_ms": value for part, value in found.items() if value is not None}
    num_tokens = sum(one.num_tokens for one in rounds)
    result["output_tokens_per_s"] = round(
        statistics.median(one.num_tokens / one.seconds for one in rounds), 1
    )
    if num_tokens:
        result["cpu_ms_per_token"] = round(sum(one.cpu_s for one in rounds) / num_tokens * 1e3, 3)
    return result


#: Numbers that have a ratio to those of another arm.
COMPARED = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "later_ttft_p50_ms",
    "later_ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "itl_p99_ms",
    "output_tokens_per_s",
    "cpu_ms_per_token",
)


def median_ratios(arm: Sequence[Round], reference: Sequence[Round]) -> dict[str, float]:
    """Arm ÷ reference by number: the median over pairs of rounds that followed each other.

    A number that is 0 in the reference has no ratio: gaps are 0 where messages arrive in bunches.
    """
    pairs = [(summarize_rounds([a]), summarize_rounds([b])) for a, b in zip(arm, reference, strict=True)]
    return {
        name: round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
        for name in COMPARED
        if all(name in a and b.get(name) for a, b in pairs)
    }
