"""`pd-serve simulate paper`: runs what the figures need, then writes tables, plots and what comes out."""

from collections.abc import Sequence
from pathlib import Path

import rich.console

from loadtests.experiments import plots
from loadtests.experiments.paper import autoscaling, fragmentation, migration, priorities, scheduling, serving
from loadtests.experiments.paper.figure import Figure, Options, Point
from loadtests.experiments.paper.tables import markdown, write_csv
from loadtests.experiments.runs import Results, run_all
from pd_serve.errors import InvalidRequestError
from pd_serve.observe import provenance as report

FIGURES: dict[int, Figure] = {
    figure.number: figure
    for figure in (
        migration.FIGURE,
        serving.FIGURE,
        fragmentation.FIGURE,
        priorities.FIGURE,
        autoscaling.AUTOSCALING,
        autoscaling.SWEEP,
        scheduling.FIGURE,
    )
    if figure.number is not None
}


def run(
    numbers: Sequence[int], options: Options, out: Path, jobs: int | None, traces: Path | None, fresh: bool
) -> None:
    """Writes `figureN-name.{csv,md,png}` for each figure, and `provenance.json`, to `out`.

    Args:
        numbers: Of the figures; none for all.

    Raises:
        InvalidRequestError: There is no such figure.
        PdServeError: Runs have failed; the others are kept.
    """
    unknown = sorted(set(numbers) - FIGURES.keys())
    if unknown:
        raise InvalidRequestError(f"no figure {unknown[0]}: there are {', '.join(map(str, FIGURES))}")
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    figures = [FIGURES[number] for number in sorted(set(numbers)) or FIGURES]
    provenance = report.provenance()
    cases = [case for figure in figures for case in figure.cases(options)]
    results = run_all(cases, out / "runs", console, jobs, traces, fresh) if cases else {}
    if not options.reference.points:
        console.print("[yellow]warning[/]  no reference: nothing of the paper's to compare with")
    for figure in figures:
        points = figure.points(options, results, console)
        notes = notes_of(figure, options, results)
        write(figure, points, notes, out, console)
    report.write(out / "provenance.json", provenance)


def write(
    figure: Figure, points: Sequence[Point], notes: Sequence[str], out: Path, console: rich.console.Console
) -> None:
    """Table, plot where matplotlib is installed, and the findings on the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / figure.file_name
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


def notes_of(figure: Figure, options: Options, results: Results) -> list[str]:
    """What a reader has to know of the runs."""
    summaries = [results[case.key] for case in figure.cases(options)]
    if not summaries:
        return []
    notes = [
        f"{len(summaries)} runs of {options.requests:,} requests, seed {options.seed}, "
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
        notes.append(f"the runs were made by {len(codes)} versions of the code")
    return notes
