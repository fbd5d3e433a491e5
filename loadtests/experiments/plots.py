"""Plots of figures: panels below each other, metrics side by side; ours solid, the paper's dashed."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtests.experiments.figure import Figure, FigurePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

COLORS = {
    "Round-Robin": "#8c8c8c",
    "INFaaS++": "#d1702a",
    "Llumnix": "#1f5fa8",
    "Llumnix-base": "#d1702a",
    "our defaults": "#2f8f4e",
    "one line": "#7b4fa3",
    "guarded moves": "#b8860b",
    "live migration": "#1f5fa8",
    "blocking copy": "#d1702a",
    "recompute": "#8c8c8c",
    "normal": "#8c8c8c",
    "while migrating": "#1f5fa8",
    "aggregated": "#8c8c8c",
    "PD": "#d1702a",
    "PD, balancing": "#1f5fa8",
    "PD, de-fragmentation and priorities": "#2f8f4e",
}
#: More metrics than this take further rows of the panel.
MOST_IN_A_ROW = 7

OTHER_COLORS = ("#7b4fa3", "#b8860b", "#008b8b", "#a83250")


def available() -> bool:
    """Whether matplotlib is installed (the extras `reports` and `dev` bring it)."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def plot(figure: Figure, points: Sequence[FigurePoint], path: Path) -> None:
    """Writes one picture, as PNG or SVG by the suffix of the file."""
    from matplotlib.figure import Figure as Sheet

    panels = list(dict.fromkeys(point.panel for point in points))
    lines = math.ceil(len(figure.metrics) / MOST_IN_A_ROW)  # of each panel
    wide, high = math.ceil(len(figure.metrics) / lines), lines * len(panels)
    size = (3.1 * wide + 0.4, 2.5 * high + 0.9) if wide * high > 1 else (8.0, 4.2)
    sheet = Sheet(figsize=size, facecolor="white", layout="constrained")
    grid = sheet.subplots(high, wide, squeeze=False)
    legend: dict[str, Any] = {}
    for place, panel in enumerate(panels):
        all_axes = grid[place * lines : (place + 1) * lines].flat
        for axes, metric in zip_longest(all_axes, figure.metrics):
            if metric is None:
                axes.remove()
                continue
            shown = [p for p in points if (p.panel, p.metric) == (panel, metric.name)]
            legend |= _curves(axes, figure, shown)
            axes.set_title(f"{panel}: {metric.name}" if len(panels) > 1 else metric.name, fontsize=9)
            axes.set_ylabel(metric.unit, fontsize=8)
            axes.set_xlabel(figure.x_label, fontsize=8)
            _scales(axes, figure, metric.log, shown)
    sheet.suptitle(figure.heading, fontsize=11)
    columns = max(1, int(size[0] / 1.9))
    sheet.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    sheet.savefig(path, dpi=110)


def _curves(axes: "Axes", figure: Figure, points: Sequence[FigurePoint]) -> dict[str, Any]:
    """Draws the curves of one plot and returns their legend handles by label."""
    handles: dict[str, Any] = {}
    for series in dict.fromkeys(point.series for point in points):
        for source, style, marker, values in (
            ("", "-", "o", [(p.x, p.ours) for p in points if p.series == series]),
            (" (paper)", "--", "x", [(p.x, p.paper) for p in points if p.series == series]),
        ):
            drawn = sorted((x, y) for x, y in values if y is not None)
            if drawn:
                (line,) = axes.plot(
                    *zip(*drawn, strict=True),
                    style,
                    color=color(series),
                    marker="" if figure.time_series else marker,
                    markersize=4,
                    linewidth=1.4,
                )
                handles[series + source] = line
    return handles


def color(series: str) -> str:
    """The color of a series, the same in every figure."""
    return COLORS.get(series) or OTHER_COLORS[sum(series.encode()) % len(OTHER_COLORS)]


def _scales(axes: "Axes", figure: Figure, log: bool, points: Sequence[FigurePoint]) -> None:
    values = [y for p in points for y in (p.ours, p.paper) if y is not None]
    if log and values and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_log_labels())
        axes.yaxis.set_minor_formatter(_log_labels())
    else:
        axes.set_ylim(bottom=0)
    if figure.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({point.x for point in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _log_labels() -> "Formatter":
    """Labels as plain numbers, for as many ticks as there is room for."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Plain(minor_thresholds=(2, 0.5))
