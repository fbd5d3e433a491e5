"""Figure 13: a tenth of the requests is of high priority; Llumnix-base schedules all alike."""

from collections.abc import Sequence

import rich.console

from loadtests.experiments.paper.comparison import against_targets, factor_lines
from loadtests.experiments.paper.curves import Place, points_of
from loadtests.experiments.paper.figure import LATENCIES, LLUMNIX, Figure, Metric, Options, Point, paper_case
from loadtests.experiments.runs import Results
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

REFERENCE = "fig13_priorities"
BASE = "Llumnix-base"
RATE, HIGH_SHARE = 26.0, 0.1
CVS = (2.0, 4.0, 6.0, 8.0)

#: Panels by the reference's names: part of the summary.
CLASSES = {"HighPriority": "high", "Normal": "normal"}


def _runs(options: Options) -> list[tuple[float, str, Scenario]]:
    runs = []
    for cv in options.pick(CVS):
        spec = TraceSpec("s-s", RATE, options.requests, f"gamma:{cv:g}", HIGH_SHARE, options.seed)
        for series, one_class in ((BASE, True), (LLUMNIX, False)):
            runs.append((cv, series, paper_case(spec, "llumnix-paper", one_class=one_class)))
    return runs


def _points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
    def paper(panel: str, series: str, metric: str) -> dict[float, float]:
        return options.reference.curve(REFERENCE, panel, series, x="cv", y=metric)

    points = []
    for panel, part in CLASSES.items():
        metrics = [Metric(m.name, ("by_priority", part, *m.path), m.unit, m.log) for m in LATENCIES]
        runs: list[tuple[Place, Scenario]] = [
            ((panel, series, cv), case) for cv, series, case in _runs(options)
        ]
        points += points_of(runs, metrics, results, paper)
    return points


def _findings(points: Sequence[Point]) -> list[str]:
    lines = against_targets(points)
    for panel in CLASSES:
        shown = [point for point in points if point.panel == panel]
        metrics = ("Request Mean", "Request P99", "Prefill Mean", "Prefill P99", "Decode Mean", "Decode P99")
        lines += [f"{panel}: {line}" for line in factor_lines(shown, metrics, BASE, LLUMNIX)]
    return lines


FIGURE = Figure(
    13,
    "priorities",
    f"Priorities: S-S at {RATE:g} requests/s, Gamma arrivals, {HIGH_SHARE:.0%} of high priority",
    "CV of the gaps between arrivals",
    LATENCIES,
    lambda options: [case for _, _, case in _runs(options)],
    _points,
    _findings,
)
