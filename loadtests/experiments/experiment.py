"""An experiment of our own: a list of runs by their place in a table, run, written and kept like a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

import rich.console

from loadtests.experiments.paper.curves import Place, points_of
from loadtests.experiments.paper.figure import Figure, Metric, Options, Point
from loadtests.experiments.paper.reproduce import notes_of, write
from loadtests.experiments.runs import Results, run_all
from pd_serve.observe import provenance as report
from pd_serve.simulation.scenario import Scenario


def run_experiment(
    name: str,
    title: str,
    x_label: str,
    runs: Sequence[tuple[Place, Scenario]],
    metrics: tuple[Metric, ...],
    findings: Callable[[Sequence[Point]], list[str]],
    options: Options,
    out: Path,
    console: rich.console.Console,
    *,
    jobs: int | None,
    traces: Path | None,
    fresh: bool,
) -> None:
    """Writes `NAME.{csv,md,png}` and `NAME-provenance.json`.

    Raises:
        PdServeError: Runs have failed; the others are kept.
    """
    provenance = report.provenance()
    results = run_all((case for _, case in runs), out / "runs", console, jobs, traces, fresh)

    def points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
        return points_of(runs, metrics, results, lambda panel, series, metric: {})

    figure = Figure(
        None, name, title, x_label, metrics, lambda options: [case for _, case in runs], points, findings
    )
    write(figure, points(options, results, console), notes_of(figure, options, results), out, console)
    report.write(out / f"{name}-provenance.json", provenance)
