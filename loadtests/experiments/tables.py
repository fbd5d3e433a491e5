"""Points as CSV with every number, and as markdown tables for readers."""

import csv
from collections.abc import Sequence
from pathlib import Path

from loadtests.experiments.comparison import medians, ratio
from loadtests.experiments.figure import Figure, FigurePoint

#: Tables with more columns are in the CSV only.
MOST_COLUMNS = 12


def write_csv(path: Path, points: Sequence[FigurePoint]) -> None:
    """Writes one row per point: ours, the paper's, and their ratio; missing numbers are empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["panel", "metric", "series", "x", "ours", "paper", "ours/paper"])
        for one in points:
            numbers = (one.x, one.ours, one.paper, ratio(one))
            cells = ["" if number is None else f"{number:.6g}" for number in numbers]
            writer.writerow([one.panel, one.metric, one.series, *cells])


def markdown(figure: Figure, points: Sequence[FigurePoint], notes: Sequence[str]) -> str:
    """Notes and findings, then a table per panel."""
    lines = [f"# {figure.heading}", "", *(f"- {note}" for note in notes)]
    if notes:
        lines.append("")
    lines += [f"- {line}" for line in figure.findings(points)]
    found = medians(points)
    if found:
        lines += ["", "| metric | median of ours / paper | points |", "|---|---|---|"]
        lines += [f"| {metric} | {median:.2f} | {count} |" for metric, (median, count) in found.items()]
    for panel in dict.fromkeys(point.panel for point in points):
        lines += ["", f"## {panel}", "", *_table(figure, [p for p in points if p.panel == panel])]
    return "\n".join(lines).rstrip() + "\n"


def _table(figure: Figure, points: Sequence[FigurePoint]) -> list[str]:
    units = {metric.name: metric.unit for metric in figure.metrics}
    xs = sorted({point.x for point in points})
    if len(xs) > MOST_COLUMNS:
        return [f"{len(points)} points: see `{figure.file_name}.csv`."]
    at = {(p.metric, p.series, p.x): p for p in points}
    rows = dict.fromkeys((p.metric, p.series) for p in points)
    head = " | ".join(f"{x:g}" for x in xs)
    lines = [f"| | {figure.x_label}: {head} |", "|---|" + "---|" * len(xs)]
    for metric, series in rows:
        cells = [_cell(at.get((metric, series, x))) for x in xs]
        lines.append(f"| {metric} ({units[metric]}), {series} | " + " | ".join(cells) + " |")
    if any(point.paper is not None for point in points):
        lines += ["", "Ours, then the paper's in brackets."]
    return lines


def _cell(point: FigurePoint | None) -> str:
    if point is None:
        return ""
    mine = "" if point.ours is None else f"{point.ours:.3g}"
    return mine if point.paper is None else f"{mine} ({point.paper:.3g})".strip()
