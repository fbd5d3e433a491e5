"""Figure 10: the cost of moving one request between two busy instances, by its length, in virtual time."""

from collections.abc import Sequence

import rich.console

from loadtests.experiments import comparison
from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric
from loadtests.experiments.result_store import Results
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings

PAPER_KEY = "fig10_migration"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DOWNTIME = Metric("Downtime", unit="ms", log=True)
STEP = Metric("Decode step", unit="ms")
PANEL = "LLaMA-7B"

#: By mode: (legend, key of the paper's points).
MODES = {
    "live": ("live migration", "migration_7b"),
    "blocking": ("blocking copy", "blocking_7b"),
    "recompute": ("recompute", "recompute_7b"),
}


def _points(options: FigureOptions, results: Results, console: rich.console.Console) -> list[FigurePoint]:
    from loadtests.experiments.paper.single_migration import Mode, measure_migration

    engine, network = EngineSettings(COST_MODELS["a10-llama-7b"]), NetworkSettings()
    modes: tuple[Mode, ...] = ("live", "blocking", "recompute")
    points = []
    for length in options.pick(LENGTHS):
        for mode in modes:
            with console.status(f"{MODES[mode][0]} of {length} tokens"):
                cost = measure_migration(length, mode, engine, network)
            series, key = MODES[mode]
            paper = _paper(options, "downtime_ms", key).get(length)
            points.append(FigurePoint(PANEL, series, DOWNTIME.name, length, cost.away_ms, paper))
            if mode == "live":
                for name, ms, column in (
                    ("normal", cost.step_ms, "normal_7b"),
                    ("while migrating", cost.step_migrating_ms, "migration_7b"),
                ):
                    paper = _paper(options, "decode_ms_total8k", column).get(length)
                    points.append(FigurePoint(PANEL, name, STEP.name, length, ms, paper))
    return points


def _paper(options: FigureOptions, table: str, column: str) -> dict[float, float]:
    lengths = options.paper.values(PAPER_KEY, "seq_len")
    return dict(zip(lengths, options.paper.values(PAPER_KEY, table, column), strict=False))


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    lines = []
    for series in dict.fromkeys(point.series for point in points):
        for metric, (median, count) in comparison.medians(p for p in points if p.series == series).items():
            lines.append(f"{metric}, {series}: median of ours / paper {median:.2f} over {count} lengths")
    live = [p.ours for p in points if p.series == "live migration" and p.ours]
    if live:
        lines.append(
            f"downtime of live migration from {min(live):.1f} to {max(live):.1f} ms over all lengths"
        )
    return lines


FIGURE = Figure(
    10,
    "migration",
    "Migration: 8k tokens in the batch of each side",
    "sequence length (tokens)",
    (DOWNTIME, STEP),
    points=_points,
    findings=_findings,
    log_x=True,
)
