"""`experiments immovable`: engines that cannot move requests, with and without hand-offs by recompute.

Four instances: neutral ones, which is what `pd-serve serve` asks for with such engines; prefill and decode
instances whose requests decode where they were prefilled; and those whose requests start again on a decode
instance after their first token. Beside them, engines whose requests move.
"""

import statistics
from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper.setup import LEFT_OUT
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.simulation.config import Moves
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec
from router.slo import Slo

#: Tokens of prompt and answer.
LENGTHS = ("2000:256", "1000:1000", "250:1000")

#: Requests/s.
RATES = (4.0, 8.0, 16.0, 24.0)

COST_MODEL = "h100-llama-3.1-8b"
SLO = Slo(0.5, 0.03)

SPLIT = {"prefill": 2, "decode": 2}
NEUTRAL, STAY, RECOMPUTE = "neutral", "PD, they stay", "PD, recompute"
ARMS: dict[str, tuple[dict[str, int], Moves]] = {
    NEUTRAL: ({"neutral": 4}, "none"),
    STAY: (SPLIT, "none"),
    RECOMPUTE: (SPLIT, "recompute"),
    "PD, they move": (SPLIT, "live"),
}

TTFT, TPOT, GAP = "TTFT Mean", "TPOT Mean", "Longest Gap P99"
METRICS = (
    Metric(TTFT, ("prefill_s", "mean"), log=True),
    Metric("TTFT P99", ("prefill_s", "p99"), log=True),
    Metric(TPOT, ("decode_s", "mean")),
    Metric("TPOT P99", ("decode_s", "p99")),
    Metric(GAP, ("longest_gap_s", "p99"), log=True),
    Metric("Attainment", ("attainment",), unit="share"),
    LEFT_OUT,
)


def scenarios_of(options: FigureOptions) -> list[PlottedScenario]:
    """Every arm with each pair of lengths at every rate."""
    scenarios = []
    for lengths in LENGTHS:
        for rate in options.pick(RATES):
            trace = TraceSpec(lengths, rate, options.requests, seed=options.seed)
            for title, (instances, moves) in ARMS.items():
                scenario = Scenario(trace, "llumnix", instances, cost_model=COST_MODEL, slo=SLO, moves=moves)
                scenarios.append(PlottedScenario(lengths, title, rate, scenario))
    return scenarios


def run_immovable(options: FigureOptions, run: ExperimentRun) -> None:
    """Writes `immovable.{csv,md,png}` and `immovable-provenance.json`.

    Raises:
        PdServeError: Simulations failed; the others are kept.
    """
    figure = Figure(
        None,
        "immovable",
        f"Engines that cannot move requests, four instances of {COST_MODEL}; SLO {SLO.ttft_s:g} s and "
        f"{SLO.tpot_s * 1e3:g} ms",
        "requests/s",
        METRICS,
        scenarios_of,
        findings=_findings,
    )
    run_figures([figure], options, run, "immovable-provenance.json")


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    """Recompute against both other uses of such engines, as geometric means over all points."""
    at = {(p.panel, p.x, p.series, p.metric): p.ours for p in points}
    places = list(dict.fromkeys((p.panel, p.x) for p in points))
    lines = []
    for base in (STAY, NEUTRAL):
        parts = []
        for metric in (TTFT, TPOT, GAP):
            pairs = [(at[*place, RECOMPUTE, metric], at[*place, base, metric]) for place in places]
            mean = statistics.geometric_mean(mine / theirs for mine, theirs in pairs if mine and theirs)
            parts.append(f"{metric} {mean:.2f} x")
        lines.append(f"{RECOMPUTE} against {base}: {', '.join(parts)}")
    return lines
