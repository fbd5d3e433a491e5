"""Figures 14 and 15: 1 to 16 instances, from 8 on, on L-L."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import rich.console

from loadtests.experiments.paper.comparison import (
    Value,
    against_targets,
    at_equal_y,
    factor_lines,
    factors,
    ours,
    papers,
)
from loadtests.experiments.paper.curves import Place, points_of
from loadtests.experiments.paper.figure import (
    BASELINE,
    LATENCIES,
    LLUMNIX,
    OURS,
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
from router.scaling import PoolBounds

REFERENCE = "fig14_autoscaling_L-L"
SWEEP_REFERENCE = "fig15_autoscaling_threshold_sweep"
INSTANCES = Metric("Avg Instances", ("avg_instances",), unit="instances")
METRICS = (*LATENCIES, INSTANCES)
RATES = (2.0, 2.2, 2.4, 2.6, 2.8, 3.0)
CVS, RATE_OF_CVS = (2.0, 4.0, 6.0), 2.0
POLICIES = ("infaas++", "llumnix-paper")

#: The thresholds that the paper swept are not known.
THRESHOLDS = (3.0, 5.0, 10.0, 20.0, 30.0, 45.0)
SWEEP_RATE = 2.0
SWEEP_PANEL = f"L-L at {SWEEP_RATE:g} requests/s"
SWEEP_METRIC = Metric("Prefill P99", ("prefill_s", "p99"), log=True)


def _case(spec: TraceSpec, policy: str, **overrides: float | int | str) -> Scenario:
    sizes: dict[str, Any] = {"instances": {"neutral": 8}, "autoscale": {"neutral": PoolBounds(1, 16)}}
    return paper_case(spec, policy, overrides=overrides, **sizes)


def _runs(options: Options) -> list[tuple[Place, Scenario]]:
    runs: list[tuple[Place, Scenario]] = []
    for policy in POLICIES:
        for rate in options.pick(RATES):
            spec = TraceSpec("l-l", rate, options.requests, "poisson", seed=options.seed)
            runs.append((("Poisson", PAPER_NAMES[policy], rate), _case(spec, policy)))
        for cv in options.pick(CVS):
            spec = TraceSpec("l-l", RATE_OF_CVS, options.requests, f"gamma:{cv:g}", seed=options.seed)
            runs.append((("Gamma", PAPER_NAMES[policy], cv), _case(spec, policy)))
    return runs


def _points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
    def paper(panel: str, series: str, metric: str) -> dict[float, float]:
        return options.reference.curve(REFERENCE, panel, series, x="x", y=metric)

    return points_of(_runs(options), METRICS, results, paper)


def _findings(points: Sequence[Point]) -> list[str]:
    lines = against_targets(points)
    lines += factor_lines(points, ("Prefill P99", "Prefill Mean"), BASELINE, LLUMNIX)
    for who, value in (("ours", ours), ("paper's points", papers)):
        found = factors(points, INSTANCES.name, BASELINE, LLUMNIX, value)
        if found:
            best, mean = max(found.values()), statistics.fmean(found.values())
            lines.append(
                f"instances, {BASELINE} / {LLUMNIX} - 1 (the paper's definition): {who} at best "
                f"{best - 1:.0%}, mean {mean - 1:.0%}"
            )
            lines.append(f"instances, 1 - {LLUMNIX} / {BASELINE}: {who} at best {1 - 1 / best:.0%}")
    return lines


def _sweep(options: Options) -> list[tuple[str, Scenario]]:
    spec = TraceSpec("l-l", SWEEP_RATE, options.requests, "poisson", seed=options.seed)
    runs = []
    for threshold in options.pick(THRESHOLDS):
        for policy in POLICIES:
            runs.append((PAPER_NAMES[policy], _case(spec, policy, scale_threshold=threshold)))
        case = _case(spec, "llumnix", scale_threshold=threshold)
        runs.append((OURS, replace(case, max_migrations=64)))
    return runs


def _sweep_points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
    points = []
    for series, case in _sweep(options):
        x = INSTANCES.of(results[case.key])
        if x is not None:
            y = SWEEP_METRIC.of(results[case.key])
            points.append(Point(SWEEP_PANEL, series, SWEEP_METRIC.name, x, ours=y))
    for series in (BASELINE, LLUMNIX):
        curve = options.reference.curve(SWEEP_REFERENCE, series, x="avg_instances", y="p99_prefill")
        points += [Point(SWEEP_PANEL, series, SWEEP_METRIC.name, x, paper=y) for x, y in curve.items()]
    return sorted(points, key=lambda point: (point.series, point.x))


def _sweep_findings(points: Sequence[Point]) -> list[str]:
    lines = []
    sides: tuple[tuple[str, str, Value], ...] = (
        (LLUMNIX, "simulated", ours),
        (LLUMNIX, "paper's points", papers),
        (OURS, "simulated", ours),
    )
    for series, who, value in sides:
        levels = at_equal_y(points, SWEEP_METRIC.name, SWEEP_PANEL, BASELINE, series, value)
        saved = [1 - under / over for _, over, under in levels]
        what = f"instances at equal prefill P99, 1 - {series} / {BASELINE}: {who}"
        if saved:
            lines.append(
                f"{what} {min(saved):.0%} to {max(saved):.0%} for P99 from {levels[0][0]:.1f} to "
                f"{levels[-1][0]:.1f} s"
            )
        else:
            lines.append(f"{what} have no P99 in common")
    return lines


AUTOSCALING = Figure(
    14,
    "autoscaling",
    f"Autoscaling: L-L, 1 to 16 instances; Poisson arrivals, and Gamma at {RATE_OF_CVS:g} requests/s",
    "requests/s (Poisson), CV (Gamma)",
    METRICS,
    lambda options: [case for _, case in _runs(options)],
    _points,
    _findings,
)

SWEEP = Figure(
    15,
    "autoscaling-threshold",
    f"Autoscaling: latency against size, by threshold; {SWEEP_PANEL}",
    "average instances",
    (SWEEP_METRIC,),
    lambda options: [case for _, case in _sweep(options)],
    _sweep_points,
    _sweep_findings,
)
