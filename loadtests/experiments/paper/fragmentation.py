"""Figure 12: free memory that no waiting request can use, over time, with and without migration."""

import statistics
from collections.abc import Sequence

import rich.console

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.paper.setup import BASELINE, LLUMNIX, PAPER_NAMES, paper_scenario
from loadtests.experiments.result_store import Results
from pd_serve.simulation.workloads import TraceSpec

RATE = 7.0
METRIC = Metric("Fragmentation", unit="% of memory")

#: Points per curve: each is the mean over an equal interval of time.
INTERVALS = 120


def _scenarios(options: FigureOptions) -> list[PlottedScenario]:
    spec = TraceSpec("m-m", RATE, options.requests, "poisson", seed=options.seed)
    return [
        PlottedScenario("M-M", PAPER_NAMES[policy], RATE, paper_scenario(spec, policy, with_series=True))
        for policy in ("infaas++", "llumnix-paper")
    ]


def _points(options: FigureOptions, results: Results, console: rich.console.Console) -> list[FigurePoint]:
    points = []
    for one in _scenarios(options):
        found = results[one.scenario.key]["series"]
        times, values = found["at_s"], found["fragmentation"]
        size = max(1, len(times) // INTERVALS)
        for begin in range(0, len(times), size):
            mean = statistics.fmean(values[begin : begin + size])
            points.append(FigurePoint(one.panel, one.series, METRIC.name, times[begin], 100 * mean))
    return points


def _findings(points: Sequence[FigurePoint]) -> list[str]:
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
    _scenarios,
    points=_points,
    findings=_findings,
    time_series=True,
)
