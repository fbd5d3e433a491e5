"""`experiments sine`: autoscaling under a load that goes up and down, beside the best fixed layout.

The fixed layout is looked for with the fast model of plans, and measured as the others are, with the real
control plane. The table is in docs/policies.md.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from loadtests.experiments.result_store import ExperimentRun, Results, run_scenarios
from loadtests.terminal import new_console
from pd_serve.errors import PdServeError
from pd_serve.observe import provenance
from pd_serve.planning.fast_cluster import FastRun, Layout
from pd_serve.simulated_engine.hardware import hardware
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec, make_requests
from router.scaling import PoolBounds
from router.slo import Slo

#: 35 minutes of a rate from 1 to 24 requests/s and back within 15, and what a request has to meet.
TRACE, RATE, ARRIVALS, REQUESTS = "8000:1000", 12.5, "sine:24:900", 26_250
PEAK = 24.0
COST_MODEL = "h100-llama-3.1-8b"
SLO = Slo(3.0, 0.05)
ATTAINMENT = 0.95

#: Instances at the start of an autoscaled cluster, and bounds of its pools.
START = {"prefill": 1, "decode": 2}
BOUNDS = {"prefill": PoolBounds(1, 12), "decode": PoolBounds(1, 24)}

Settings = dict[str, float | int | str]
BY_WORK: Settings = {"scaling": "work", "prefill_scaling": "work"}

#: Settings of the autoscaled clusters, by title.
ARMS: dict[str, Settings] = {
    "freeness": {},
    "freeness, forecast": {"forecast_s": 60.0},
    "work": BY_WORK,
    "work, forecast": BY_WORK | {"forecast_s": 60.0},
}

#: Fixed layouts that are simulated at most.
MOST_LAYOUTS = 6


class FixedLayout(NamedTuple):
    """Numbers of instances."""

    prefill: int
    decode: int

    @property
    def size(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill} + {self.decode} instances"


@dataclass(frozen=True, slots=True)
class SineOptions:
    """What is run.

    Attributes:
        share: Of the rate, and so of the requests and the CPU time.
        arms: Titles of `ARMS`.
    """

    seeds: int = 3
    share: float = 1.0
    arms: tuple[str, ...] = tuple(ARMS)

    @property
    def trace(self) -> TraceSpec:
        return TraceSpec(TRACE, RATE * self.share, round(REQUESTS * self.share), ARRIVALS)


@dataclass(frozen=True, slots=True)
class Measured:
    """A cluster under the load, one number for each seed.

    Attributes:
        instance_hours: Start-up times included.
        ttft_p99_s, tpot_p99_s: None without a request that was served.
    """

    title: str
    attainment: list[float]
    instance_hours: list[float]
    ttft_p99_s: list[float | None]
    tpot_p99_s: list[float | None]

    @property
    def holds(self) -> bool:
        """Whether the target is held with every seed."""
        return min(self.attainment) >= ATTAINMENT

    @property
    def mean_hours(self) -> float:
        return sum(self.instance_hours) / len(self.instance_hours)


def scenarios_of(
    options: SineOptions,
    instances: dict[str, int],
    settings: Settings | None = None,
    bounds: dict[str, PoolBounds] | None = None,
) -> list[Scenario]:
    """One cluster with every seed."""
    target: Settings = {"itl_target_s": SLO.tpot_s}
    return [
        Scenario(
            replace(options.trace, seed=seed),
            "llumnix",
            instances,
            target | (settings or {}),
            COST_MODEL,
            autoscale=bounds or {},
            slo=SLO,
        )
        for seed in range(options.seeds)
    ]


def measured(title: str, scenarios: Sequence[Scenario], results: Results) -> Measured:
    """Raises: PdServeError: requests failed or tokens are wrong, so that the run means nothing."""
    found = [results[scenario.key] for scenario in scenarios]
    for name in ("failed", "lost_tokens", "duplicated_tokens", "wrong_tokens", "leaked_blocks"):
        if any(summary[name] for summary in found):
            raise PdServeError(f"{title}: {name}: {[summary[name] for summary in found]}")
    return Measured(
        title,
        [summary["attainment"] for summary in found],
        [summary["avg_instances"] * summary["duration_s"] / 3600 for summary in found],
        [summary["prefill_s"]["p99"] for summary in found],
        [summary["decode_s"]["p99"] for summary in found],
    )


def promising(requests: Sequence[TraceRequest], peak: float) -> list[FixedLayout]:
    """For each number of prefill instances near what the peak takes, the least decode instances that hold the
    target by the fast model; the smallest layout first.

    Args:
        peak: Greatest rate, in requests/s.
    """
    machine = hardware(COST_MODEL)
    prompt_s = machine.engine.cost_model.prefill_s([(requests[0].prompt_tokens, 0)])
    at_peak = int(peak * prompt_s)

    def holds(layout: FixedLayout) -> bool:
        plan = Layout(prefill=layout.prefill, decode=layout.decode, chunk_tokens=machine.engine.chunk_tokens)
        run = FastRun(machine, plan, SLO, max_misses=(1 - ATTAINMENT) * len(requests))
        run.run(requests)
        return run.attainment >= ATTAINMENT

    found = []
    for prefill in range(max(at_peak, 1), at_peak + 3):
        fits = bisect_left(
            range(BOUNDS["decode"].most), True, key=lambda n: holds(FixedLayout(prefill, n + 1))
        )
        if fits < BOUNDS["decode"].most:
            found.append(FixedLayout(prefill, fits + 1))
    return sorted(found, key=lambda layout: (layout.size, layout))


def best_fixed(
    candidates: Sequence[FixedLayout], measure: Callable[[FixedLayout], Measured]
) -> dict[FixedLayout, Measured]:
    """Measures layouts until the smallest that holds the target is known: one instance less does not.

    Returns: all that were measured, at most `MOST_LAYOUTS`; the best one is the smallest that holds.
    """
    tried: dict[FixedLayout, Measured] = {}
    best = math.inf
    for first in candidates:
        layout, is_down = first, False
        while layout.size < best and layout not in tried and layout.decode and len(tried) < MOST_LAYOUTS:
            tried[layout] = measure(layout)
            if tried[layout].holds:
                best, is_down = layout.size, True
            elif is_down:
                break
            layout = layout._replace(decode=layout.decode + (-1 if is_down else 1))
    return tried


def run_sine(options: SineOptions, run: ExperimentRun) -> None:
    """Writes `sine.{json,md}`.

    Raises:
        PdServeError: A simulation failed, or no fixed layout holds the target.
    """
    console = new_console()
    at_start = provenance.provenance()

    def measure(clusters: dict[str, list[Scenario]]) -> list[Measured]:
        results = run_scenarios([one for each in clusters.values() for one in each], run, console)
        return [measured(title, scenarios, results) for title, scenarios in clusters.items()]

    def measure_fixed(layout: FixedLayout) -> Measured:
        (found,) = measure({f"{layout}": scenarios_of(options, layout._asdict())})
        console.print(f"{layout}: {min(found.attainment):.2%}, {found.mean_hours:.2f} instance-hours")
        return found

    tried = best_fixed(promising(make_requests(options.trace), PEAK * options.share), measure_fixed)
    held = [layout for layout, one in tried.items() if one.holds]
    if not held:
        raise PdServeError(f"no fixed layout holds the target: {', '.join(map(str, tried)) or 'none fits'}")
    best = tried[min(held, key=lambda layout: layout.size)]
    rows = [
        *tried.values(),
        *measure({title: scenarios_of(options, START, ARMS[title], BOUNDS) for title in options.arms}),
    ]
    provenance.write(
        run.out / "sine.json",
        {
            "slo": {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s, "attainment": ATTAINMENT},
            "workload": asdict(options.trace),
            "best_fixed": best.title,
            "clusters": [
                asdict(row) | {"hours_to_best_fixed": row.mean_hours / best.mean_hours} for row in rows
            ],
        }
        | at_start,
    )
    table = markdown(rows, best)
    (run.out / "sine.md").write_text(table, encoding="utf-8")
    console.print(table, markup=False)


def markdown(rows: Sequence[Measured], best: Measured) -> str:
    """A row for each cluster; several numbers are those of the seeds."""

    def each(numbers: Sequence[float | None], text: str) -> str:
        return ", ".join("-" if number is None else text.format(number) for number in numbers)

    lines = [
        f"Within {SLO.ttft_s:g} s to the first token, and {SLO.tpot_s * 1e3:g} ms for later ones; by seed.",
        "",
        "| cluster | within | instance-hours | to the best fixed layout | TTFT P99, s | TPOT P99, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        tpot_ms = [None if s is None else 1e3 * s for s in row.tpot_p99_s]
        cells = (
            row.title + (" (best fixed)" if row is best else ""),
            each(row.attainment, "{:.1%}"),
            each(row.instance_hours, "{:.2f}"),
            f"{row.mean_hours / best.mean_hours:.2f}",
            each(row.ttft_p99_s, "{:.2f}"),
            each(tpot_ms, "{:.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
