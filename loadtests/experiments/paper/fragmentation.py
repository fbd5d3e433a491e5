"""Figure 12: memory that is free but useless, over time, with and without migration."""

import statistics
from collections.abc import Sequence

import rich.console

from loadtests.experiments.paper.figure import (
    BASELINE,
    LLUMNIX,
    PAPER_NAMES,
    Figure,
    Metric,
    Options,
    Point,
    paper_case,
)
from loadtests.experiments.runs import Results
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

RATE = 7.0
METRIC = Metric("Fragmentation", unit="% of memory")

#: Points per curve: samples are averaged over equal stretches of time.
STRETCHES = 120


def _runs(options: Options) -> dict[str, Scenario]:
    spec = TraceSpec("m-m", RATE, options.requests, "poisson", seed=options.seed)
    return {
        PAPER_NAMES[policy]: paper_case(spec, policy, with_series=True)
        for policy in ("infaas++", "llumnix-paper")
    }


def _points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
    points = []
    for series, case in _runs(options).items():
        found = results[case.key]["series"]
        times, values = found["at_s"], found["fragmentation"]
        size = max(1, len(times) // STRETCHES)
        for begin in range(0, len(times), size):
            mean = statistics.fmean(values[begin : begin + size])
            points.append(Point("M-M", series, METRIC.name, times[begin], 100 * mean))
    return points


def _findings(points: Sequence[Point]) -> list[str]:
    means = {
        series: statistics.fmean(p.ours for p in points if p.series == series and p.ours is not None)
        for series in (BASELINE, LLUMNIX)
    }
    change = (
        f", 1 - {LLUMNIX} / {BASELINE} = {1 - means[LLUMNIX] / means[BASELINE]:.0%}"
        if means[BASELINE]
        else ""
    )
    return [
        f"mean over time at {RATE:g} requests/s: "
        + ", ".join(f"{s} {m:.2f} %" for s, m in means.items())
        + change
    ]


FIGURE = Figure(
    12,
    "fragmentation",
    f"Fragmentation: M-M at {RATE:g} requests/s",
    "time (s)",
    (METRIC,),
    lambda options: list(_runs(options).values()),
    _points,
    _findings,
    time_series=True,
)
