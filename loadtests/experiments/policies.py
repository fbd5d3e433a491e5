"""`experiments policies`: the gain of each step from the paper's Llumnix to our defaults.

This table decides which policies are defaults; see docs/policies.md.
"""

import statistics
from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper.setup import LATENCIES
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

#: By title: (trace, requests/s): the highest rates of figure 11.
TRACES: dict[str, tuple[str, float]] = {
    "S-S at 36/s": ("s-s", 36.0),
    "M-M at 7.25/s": ("m-m", 7.25),
    "BurstGPT at 9.25/s": ("burstgpt", 9.25),
    "L-L at 3/s": ("l-l", 3.0),
}

#: By title: (policy, changed settings, migrations per instance and direction at a time).
VARIANTS: dict[str, tuple[str, dict[str, float | int | str], int]] = {
    "Llumnix": ("llumnix-paper", {}, 1),
    "one line": ("llumnix-paper", {"late_binding": 1}, 1),
    "guarded moves": ("llumnix", {"late_binding": 0}, 64),
    "our defaults": ("llumnix", {}, 64),
}

METRICS = (
    *LATENCIES,
    Metric("Longest gap P99", ("longest_gap_s", "p99")),
    Metric("Preemption Loss", ("preemption_loss_s",)),
)


def scenarios_of(options: FigureOptions, seeds: Sequence[int]) -> list[PlottedScenario]:
    """Every variant on every trace with every seed."""
    scenarios = []
    for title, (trace, rate) in TRACES.items():
        for seed in seeds:
            spec = TraceSpec(trace, rate, options.requests, "poisson", seed=seed)
            for variant, (policy, overrides, moves) in VARIANTS.items():
                scenario = Scenario(spec, policy, overrides=overrides, max_migrations=moves)
                scenarios.append(PlottedScenario(title, variant, float(seed), scenario))
    return scenarios


def run_policies(options: FigureOptions, seeds: Sequence[int], run: ExperimentRun) -> None:
    """Writes `policies.{csv,md,png}` and `policies-provenance.json`.

    Raises:
        PdServeError: Simulations failed; the others are kept.
    """
    figure = Figure(
        None,
        "policies",
        "From the paper's Llumnix to our defaults, step by step: 16 neutral instances at the highest rates",
        "seed",
        METRICS,
        lambda options: scenarios_of(options, seeds),
        findings=_findings,
    )
    run_figures([figure], options, run, "policies-provenance.json")


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    """Per trace: the paper's Llumnix ÷ variant, geometric mean over the seeds."""
    at = {(p.panel, p.x, p.metric, p.series): p.ours for p in points}
    lines = []
    for panel in dict.fromkeys(p.panel for p in points):
        parts = []
        for variant in list(VARIANTS)[1:]:
            gains = []
            for metric in ("Prefill P99", "Prefill Mean", "Request P99"):
                ratios = [
                    base / mine
                    for x in dict.fromkeys(p.x for p in points)
                    if (base := at[panel, x, metric, "Llumnix"]) and (mine := at[panel, x, metric, variant])
                ]
                if ratios:
                    gains.append(f"{metric} {statistics.geometric_mean(ratios):.2f} x")
            parts.append(f"{variant}: {', '.join(gains)}")
        lines.append(f"{panel}, better than the paper's Llumnix by: " + "; ".join(parts))
    return lines
