"""Figures 14 and 15: autoscaling from 1 to 16 instances, starting with 8, on L-L."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import rich.console

from loadtests.experiments import comparison
from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.paper.setup import (
    BASELINE,
    LATENCIES,
    LLUMNIX,
    OURS,
    PAPER_NAMES,
    paper_curve,
    paper_scenario,
)
from loadtests.experiments.result_store import Results
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec
from router.scaling import PoolBounds

PAPER_KEY = "fig14_autoscaling_L-L"
SWEEP_PAPER_KEY = "fig15_autoscaling_threshold_sweep"
INSTANCES = Metric("Avg Instances", ("avg_instances",), unit="instances")
METRICS = (*LATENCIES, INSTANCES)
RATES = (2.0, 2.2, 2.4, 2.6, 2.8, 3.0)
CVS, RATE_OF_CVS = (2.0, 4.0, 6.0), 2.0
POLICIES = ("infaas++", "llumnix-paper")

#: With these thresholds and Gamma arrivals the paper's numbers of instances come out.
THRESHOLDS = (5.0, 25.0, 45.0, 65.0, 85.0)
SWEEP_RATE, SWEEP_ARRIVALS = 2.0, "gamma:2"
SWEEP_PANEL = f"L-L at {SWEEP_RATE:g} requests/s"
SWEEP_METRIC = Metric("Prefill P99", ("prefill_s", "p99"), log=True)


def _scenario(spec: TraceSpec, policy: str, **overrides: float | int | str) -> Scenario:
    sizes: dict[str, Any] = {"instances": {"neutral": 8}, "autoscale": {"neutral": PoolBounds(1, 16)}}
    return paper_scenario(spec, policy, overrides=overrides, **sizes)


def _scenarios(options: FigureOptions) -> list[PlottedScenario]:
    scenarios = []
    for policy in POLICIES:
        series = PAPER_NAMES[policy]
        for rate in options.pick(RATES):
            spec = TraceSpec("l-l", rate, options.requests, "poisson", seed=options.seed)
            scenarios.append(PlottedScenario("Poisson", series, rate, _scenario(spec, policy)))
        for cv in options.pick(CVS):
            spec = TraceSpec("l-l", RATE_OF_CVS, options.requests, f"gamma:{cv:g}", seed=options.seed)
            scenarios.append(PlottedScenario("Gamma", series, cv, _scenario(spec, policy)))
    return scenarios


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    lines = comparison.against_targets(points)
    lines += comparison.factor_lines(points, ("Prefill P99", "Prefill Mean"), BASELINE, LLUMNIX)
    for source, side in comparison.SIDES.items():
        found = comparison.factors(points, INSTANCES.name, BASELINE, LLUMNIX, side)
        if found:
            best, mean = max(found.values()), statistics.fmean(found.values())
            lines.append(
                f"instances, {BASELINE} / {LLUMNIX} - 1 (the paper's definition): {source} at best "
                f"{best - 1:.0%}, mean {mean - 1:.0%}"
            )
            lines.append(f"instances, 1 - {LLUMNIX} / {BASELINE}: {source} at best {1 - 1 / best:.0%}")
    return lines


def _sweep_scenarios(options: FigureOptions) -> list[PlottedScenario]:
    spec = TraceSpec("l-l", SWEEP_RATE, options.requests, SWEEP_ARRIVALS, seed=options.seed)
    scenarios = []
    for threshold in options.pick(THRESHOLDS):
        by_series = {PAPER_NAMES[p]: _scenario(spec, p, scale_threshold=threshold) for p in POLICIES}
        by_series[OURS] = replace(_scenario(spec, "llumnix", scale_threshold=threshold), max_migrations=64)
        scenarios += [
            PlottedScenario(SWEEP_PANEL, series, threshold, scenario)
            for series, scenario in by_series.items()
        ]
    return scenarios


def _sweep_points(
    options: FigureOptions, results: Results, console: rich.console.Console
) -> list[FigurePoint]:
    points = []
    for one in _sweep_scenarios(options):
        summary = results[one.scenario.key]
        x = INSTANCES.of(summary)
        if x is not None:
            y = SWEEP_METRIC.of(summary)
            points.append(FigurePoint(SWEEP_PANEL, one.series, SWEEP_METRIC.name, x, ours=y))
    for series in (BASELINE, LLUMNIX):
        curve = options.paper.curve(SWEEP_PAPER_KEY, series, x="avg_instances", y="p99_prefill")
        points += [FigurePoint(SWEEP_PANEL, series, SWEEP_METRIC.name, x, paper=y) for x, y in curve.items()]
    return sorted(points, key=lambda point: (point.series, point.x))


def _sweep_findings(points: Sequence[FigurePoint]) -> list[str]:
    lines = []
    sides: tuple[tuple[str, str, comparison.Side], ...] = (
        (LLUMNIX, "simulated", "ours"),
        (LLUMNIX, "paper's points", "paper"),
        (OURS, "simulated", "ours"),
    )
    for series, source, side in sides:
        levels = comparison.at_equal_y(points, SWEEP_METRIC.name, SWEEP_PANEL, BASELINE, series, side)
        saved = [1 - under / over for _, over, under in levels]
        title = f"instances at equal prefill P99, 1 - {series} / {BASELINE}: {source}"
        if saved:
            lines.append(
                f"{title} {min(saved):.0%} to {max(saved):.0%} for P99 from {levels[0][0]:.1f} to "
                f"{levels[-1][0]:.1f} s"
            )
        else:
            lines.append(f"{title} have no P99 in common")
    return lines


AUTOSCALING = Figure(
    14,
    "autoscaling",
    f"Autoscaling: L-L, 1 to 16 instances; Poisson arrivals, and Gamma at {RATE_OF_CVS:g} requests/s",
    "requests/s (Poisson), CV (Gamma)",
    METRICS,
    _scenarios,
    paper_curve=paper_curve(PAPER_KEY, "x"),
    findings=_findings,
)

SWEEP = Figure(
    15,
    "autoscaling-threshold",
    f"Autoscaling: latency against size, by threshold; {SWEEP_PANEL}",
    "average instances",
    (SWEEP_METRIC,),
    _sweep_scenarios,
    points=_sweep_points,
    findings=_sweep_findings,
)
