"""Figure 13: a tenth of the requests has high priority; Llumnix-base schedules all requests alike."""

from collections.abc import Sequence
from dataclasses import replace

import rich.console

from loadtests.experiments import comparison
from loadtests.experiments.figure import (
    Figure,
    FigureOptions,
    FigurePoint,
    Metric,
    PlottedScenario,
    points_of,
)
from loadtests.experiments.paper.setup import LATENCIES, LLUMNIX, paper_curve, paper_scenario
from loadtests.experiments.result_store import Results
from pd_serve.simulation.workloads import TraceSpec

PAPER_KEY = "fig13_priorities"
BASE = "Llumnix-base"
RATE, HIGH_SHARE = 26.0, 0.1
CVS = (2.0, 4.0, 6.0, 8.0)

#: Panels by the names of the paper's points, with their part of the summary.
CLASSES = {"HighPriority": "high", "Normal": "normal"}


def _scenarios(options: FigureOptions) -> list[PlottedScenario]:
    scenarios = []
    for cv in options.pick(CVS):
        spec = TraceSpec("s-s", RATE, options.requests, f"gamma:{cv:g}", HIGH_SHARE, options.seed)
        for series, one_class in ((BASE, True), (LLUMNIX, False)):
            scenario = paper_scenario(spec, "llumnix-paper", one_class=one_class)
            scenarios.append(PlottedScenario("", series, cv, scenario))
    return scenarios


def _points(options: FigureOptions, results: Results, console: rich.console.Console) -> list[FigurePoint]:
    points = []
    for panel, part in CLASSES.items():
        metrics = [Metric(m.name, ("by_priority", part, *m.path), m.unit, m.log) for m in LATENCIES]
        scenarios = [replace(one, panel=panel) for one in _scenarios(options)]
        points += points_of(scenarios, metrics, results, options, paper_curve(PAPER_KEY, "cv"))
    return points


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    lines = comparison.against_targets(points)
    for panel in CLASSES:
        shown = [point for point in points if point.panel == panel]
        metrics = ("Request Mean", "Request P99", "Prefill Mean", "Prefill P99", "Decode Mean", "Decode P99")
        lines += [f"{panel}: {line}" for line in comparison.factor_lines(shown, metrics, BASE, LLUMNIX)]
    return lines


FIGURE = Figure(
    13,
    "priorities",
    f"Priorities: S-S at {RATE:g} requests/s, Gamma arrivals, {HIGH_SHARE:.0%} with high priority",
    "CV of the gaps between arrivals",
    LATENCIES,
    _scenarios,
    points=_points,
    findings=_findings,
)
