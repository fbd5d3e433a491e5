"""`experiments policies`: the gain of each step from the paper's Llumnix to our defaults.

This table decides which policies are defaults; see docs/policies.md.
"""

import statistics
from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper.setup import LATENCIES, LEFT_OUT
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.summary import PROMPT_CLASSES
from pd_serve.simulation.workloads import TraceSpec

#: By title: (trace, requests/s): the highest rates of figure 11.
TRACES: dict[str, tuple[str, float]] = {
    "S-S at 36/s": ("s-s", 36.0),
    "M-M at 7.25/s": ("m-m", 7.25),
    "BurstGPT at 9.25/s": ("burstgpt", 9.25),
    "L-L at 3/s": ("l-l", 3.0),
}

Settings = dict[str, float | int | str]

#: Title of the variant that may become our defaults.
CANDIDATE = "candidate"

#: By title: (policy, changed settings, migrations per instance and direction at a time).
VARIANTS: dict[str, tuple[str, Settings, int]] = {
    "Llumnix": ("llumnix-paper", {}, 1),
    "one line": ("llumnix-paper", {"late_binding": 1}, 1),
    "guarded moves": ("llumnix", {"late_binding": 0}, 64),
    "our defaults": ("llumnix", {}, 64),
}

METRICS = (
    *LATENCIES,
    *(
        Metric(f"Prefill P99, {name} prompts", ("by_prompt", name, "prefill_s", "p99"), log=True)
        for name in PROMPT_CLASSES
    ),
    Metric("Longest gap P99", ("longest_gap_s", "p99")),
    Metric("Preemption Loss", ("preemption_loss_s",)),
    LEFT_OUT,
)


def scenarios_of(
    options: FigureOptions, seeds: Sequence[int], candidate: Settings | None = None
) -> list[PlottedScenario]:
    """Every variant on every trace with every seed.

    Args:
        candidate: Changed settings of our defaults, as one more variant.
    """
    variants = dict(VARIANTS)
    if candidate:
        variants[CANDIDATE] = ("llumnix", candidate, 64)
    scenarios = []
    for title, (trace, rate) in TRACES.items():
        for seed in seeds:
            spec = TraceSpec(trace, rate, options.requests, "poisson", seed=seed)
            for variant, (policy, overrides, moves) in variants.items():
                scenario = Scenario(spec, policy, overrides=overrides, max_migrations=moves)
                scenarios.append(PlottedScenario(title, variant, float(seed), scenario))
    return scenarios


def run_policies(
    options: FigureOptions, seeds: Sequence[int], run: ExperimentRun, candidate: Settings | None = None
) -> None:
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
        lambda options: scenarios_of(options, seeds, candidate),
        findings=_findings,
    )
    run_figures([figure], options, run, "policies-provenance.json")


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    """Per trace: the paper's Llumnix ÷ variant, geometric mean over the seeds."""
    at = {(p.panel, p.x, p.metric, p.series): p.ours for p in points}
    lines = []
    for panel in dict.fromkeys(p.panel for p in points):
        parts = []
        for variant in [*VARIANTS][1:] + [CANDIDATE] * (CANDIDATE in {p.series for p in points}):
            gains = []
            for metric in ("Prefill P99", "Prefill P99, long prompts", "Prefill Mean", "Request P99"):
                ratios = [
                    base / mine
                    for x in dict.fromkeys(p.x for p in points)
                    if (base := at.get((panel, x, metric, "Llumnix")))
                    and (mine := at.get((panel, x, metric, variant)))
                ]
                if ratios:
                    gains.append(f"{metric} {statistics.geometric_mean(ratios):.2f} x")
            parts.append(f"{variant}: {', '.join(gains)}")
        lines.append(f"{panel}, better than the paper's Llumnix by: " + "; ".join(parts))
    return lines
