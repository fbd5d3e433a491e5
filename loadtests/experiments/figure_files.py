"""Runs the simulations of figures and writes each figure as a table (CSV, markdown) and a plot."""

from collections.abc import Sequence

import rich.console

from loadtests.experiments import plots
from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint
from loadtests.experiments.result_store import ExperimentRun, Results, run_scenarios
from loadtests.experiments.tables import markdown, write_csv
from loadtests.terminal import new_console
from pd_serve.observe import provenance


def run_figures(
    figures: Sequence[Figure], options: FigureOptions, run: ExperimentRun, provenance_file: str
) -> None:
    """Writes `figureN-NAME.{csv,md,png}` (or `NAME.*`) for each figure, and the provenance.

    Raises:
        PdServeError: Simulations failed; the others are kept.
    """
    console = new_console()
    at_start = provenance.provenance()
    scenarios = [one.scenario for figure in figures for one in figure.scenarios(options)]
    results = run_scenarios(scenarios, run, console)
    for figure in figures:
        points = figure.all_points(options, results, console)
        write_figure(figure, points, notes_of(figure, options, results), run, console)
    provenance.write(run.out / provenance_file, at_start)


def write_figure(
    figure: Figure,
    points: Sequence[FigurePoint],
    notes: Sequence[str],
    run: ExperimentRun,
    console: rich.console.Console,
) -> None:
    """Writes tables, a plot if matplotlib is installed, and prints the findings."""
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / figure.file_name
    write_csv(path.with_suffix(".csv"), points)
    path.with_suffix(".md").write_text(markdown(figure, points, notes), encoding="utf-8")
    if plots.available():
        plots.plot(figure, points, path.with_suffix(".png"))
    else:
        console.print("[yellow]warning[/]  no plots without matplotlib: pip install 'pd-serve[reports]'")
    console.print(f"[bold]{figure.heading}[/]")
    for line in [*notes, *figure.findings(points)]:
        console.print(f"  {line}", markup=False)
    console.print(f"  written to {path}.csv, .md" + (", .png" if plots.available() else ""), markup=False)


def notes_of(figure: Figure, options: FigureOptions, results: Results) -> list[str]:
    """Facts about the simulations: their size and cost, and every fault that they found."""
    scenarios = [one.scenario for one in figure.scenarios(options)]
    summaries = [results[scenario.key] for scenario in scenarios]
    if not summaries:
        return []
    sizes = sorted({scenario.trace.requests or options.requests for scenario in scenarios})
    size = " to ".join(f"{requests:,}" for requests in dict.fromkeys((sizes[0], sizes[-1])))
    notes = [
        f"{len(summaries)} simulations of {size} requests, seed {options.seed}, "
        f"{sum(s['wall_s'] for s in summaries):,.0f} s of one core"
    ]
    if figure.number and options.requests != 10_000:
        notes.append(
            f"the paper has 10,000 requests per run: {options.requests:,} load the cluster for less time"
        )
    for name in ("failed", "left_out", "lost_tokens", "duplicated_tokens", "wrong_tokens", "leaked_blocks"):
        if wrong := sum(summary[name] for summary in summaries):
            notes.append(f"{name.replace('_', ' ')}: {wrong}")
    notes += sorted({f"integrity: {line}" for summary in summaries for line in summary["integrity"]})[:5]
    codes = {summary["code"] for summary in summaries}
    if len(codes) > 1:
        notes.append(f"the results come from {len(codes)} versions of the code")
    return notes
