"""Comparisons of points: ours against the paper's, and one policy against another."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from loadtests.experiments.figure import FigurePoint

#: (title, names of metrics, allowed distance of the median ratio from 1).
TARGETS = (
    ("request", ("Request Mean", "Request P99"), 0.15),
    ("decode", ("Decode Mean", "Decode P99"), 0.15),
    ("prefill mean", ("Prefill Mean",), 0.30),
    ("prefill P99", ("Prefill P99",), 0.30),
)

#: The two numbers of a point.
Side = Literal["ours", "paper"]
SIDES: dict[str, Side] = {"ours": "ours", "paper's points": "paper"}


def ratio(point: FigurePoint) -> float | None:
    """Ours / paper's, if both exist and are not 0."""
    return point.ours / point.paper if point.ours and point.paper else None


def medians(points: Iterable[FigurePoint]) -> dict[str, tuple[float, int]]:
    """(median ratio, number of points) by metric, in the order of the points."""
    ratios: dict[str, list[float]] = {}
    for point in points:
        found = ratio(point)
        if found is not None:
            ratios.setdefault(point.metric, []).append(found)
    return {metric: (statistics.median(values), len(values)) for metric, values in ratios.items()}


def against_targets(points: Sequence[FigurePoint]) -> list[str]:
    """A line per target: the median of our points over the paper's, all series and panels together."""
    lines = []
    for title, metrics, allowed in TARGETS:
        ratios = [found for p in points if p.metric in metrics and (found := ratio(p)) is not None]
        if ratios:
            median = statistics.median(ratios)
            verdict = "reached" if abs(median - 1) <= allowed else "MISSED"
            lines.append(
                f"{title}: median of ours / paper {median:.2f} over {len(ratios)} points, "
                f"from {min(ratios):.2f} to {max(ratios):.2f} (target: 1 ± {allowed:g}): {verdict}"
            )
    return lines


def factors(
    points: Iterable[FigurePoint], metric: str, over: str, under: str, side: Side
) -> dict[tuple[str, float], float]:
    """Series `over` divided by series `under`, by (panel, x), where both exist."""
    at = {(p.panel, p.series, p.x): getattr(p, side) for p in points if p.metric == metric}
    found = {}
    for (panel, series, x), upper in at.items():
        lower = at.get((panel, under, x))
        if series == over and upper is not None and lower:
            found[panel, x] = upper / lower
    return found


def factor_lines(points: Sequence[FigurePoint], metrics: Sequence[str], over: str, under: str) -> list[str]:
    """The factors between two policies, ours and the paper's by the same formula."""
    lines = []
    for metric in metrics:
        parts = []
        for source, side in SIDES.items():
            found = factors(points, metric, over, under, side)
            if found:
                (panel, x), best = max(found.items(), key=lambda item: item[1])
                mean = math.exp(statistics.fmean(math.log(max(f, 1e-9)) for f in found.values()))
                parts.append(f"{source} at best {best:.1f} ({panel}, {x:g}), geometric mean {mean:.2f}")
        if parts:
            lines.append(f"{metric}, {over} / {under}: " + "; ".join(parts))
    return lines


def reduction_line(points: Sequence[FigurePoint], metric: str, over: str, under: str) -> list[str]:
    """Mean over the points of 1 - `under` / `over`."""
    parts = []
    for source, side in SIDES.items():
        found = factors(points, metric, under, over, side)
        if found:
            parts.append(f"{source} {1 - statistics.fmean(found.values()):.0%}")
    title = f"{metric}, 1 - {under} / {over}, mean over the points where {over} is not 0: "
    return [title + "; ".join(parts)] if parts else []


def at_equal_y(
    points: Iterable[FigurePoint], metric: str, panel: str, over: str, under: str, side: Side
) -> list[tuple[float, float, float]]:
    """(y, x of `over`, x of `under`) at each y that both curves reach, interpolated on a logarithmic scale.

    The y values are those of the curves' own points within the common range.
    """
    curves = {}
    for series in (over, under):
        chosen = [p for p in points if (p.panel, p.metric, p.series) == (panel, metric, series)]
        curves[series] = sorted((math.log(y), p.x) for p in chosen if (y := getattr(p, side)))
    if not all(curves.values()):
        return []
    low = max(curve[0][0] for curve in curves.values())
    high = min(curve[-1][0] for curve in curves.values())
    levels = sorted({y for curve in curves.values() for y, _ in curve if low <= y <= high})
    return [(math.exp(y), _at(curves[over], y), _at(curves[under], y)) for y in levels]


def _at(curve: Sequence[tuple[float, float]], y: float) -> float:
    for (y0, x0), (y1, x1) in pairwise(curve):
        if y0 <= y <= y1:
            return x0 if y1 == y0 else x0 + (x1 - x0) * (y - y0) / (y1 - y0)
    return curve[-1][1] if y >= curve[-1][0] else curve[0][1]
