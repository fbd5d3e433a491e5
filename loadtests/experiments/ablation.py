"""`pd-serve simulate policies`: what each step from the paper's Llumnix to our defaults gives.

A policy is in the defaults because of this table; see docs/policies.md.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import rich.console

from loadtests.experiments.experiment import run_experiment
from loadtests.experiments.paper.curves import Place
from loadtests.experiments.paper.figure import LATENCIES, Metric, Options, Point
from loadtests.experiments.paper.reference import Reference
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


def runs_of(requests: int, seeds: Sequence[int], titles: Sequence[str]) -> list[tuple[Place, Scenario]]:
    """Every variant on every trace with every seed."""
    runs: list[tuple[Place, Scenario]] = []
    for title in titles:
        trace, rate = TRACES[title]
        for seed in seeds:
            spec = TraceSpec(trace, rate, requests, "poisson", seed=seed)
            for variant, (policy, overrides, moves) in VARIANTS.items():
                case = Scenario(spec, policy, overrides=overrides, max_migrations=moves)
                runs.append(((title, variant, float(seed)), case))
    return runs


def run(out: Path, requests: int, seeds: Sequence[int], jobs: int | None, fresh: bool) -> None:
    """Writes `policies.{csv,md,png}`. Raises: PdServeError: runs have failed; the others are kept."""
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    run_experiment(
        "policies",
        "From the paper's Llumnix to our defaults, step by step: 16 neutral instances at the highest rates",
        "seed",
        runs_of(requests, seeds, list(TRACES)),
        METRICS,
        _findings,
        Options(requests, frozenset({"all"}), seeds[0], Reference()),
        out,
        console,
        jobs=jobs,
        traces=None,
        fresh=fresh,
    )


def _findings(points: Sequence[Point]) -> list[str]:
    """Per trace: the paper's Llumnix / variant, geometric mean over the seeds."""
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
