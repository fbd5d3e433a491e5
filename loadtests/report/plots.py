"""The plots of a load test's report: panels over one time axis, in one picture or one picture each."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtests.report import cluster_samples
from loadtests.report.cluster_samples import ClusterSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Length of the windows for medians and P99 over time.
WINDOW_S = 10.0

#: An inch is a seventh of the width of a phone's screen, so that text stays readable there.
PANEL_INCHES = (5.2, 3.0)

COLORS = ("#1f5fa8", "#d1702a", "#2f8f4e", "#7b4fa3", "#b8860b", "#008b8b", "#a83250", "#8c8c8c")
STATES = {"starting": "#c9c9c9", "ready": "#2f8f4e", "draining": "#d1702a"}


@dataclass(frozen=True, slots=True)
class PlotData:
    """The data of all panels.

    Attributes:
        requests: Rows of the load test's report.
        events: (seconds since the load began, action taken on the cluster).
    """

    requests: Sequence[dict[str, Any]]
    samples: Sequence[ClusterSample]
    events: Sequence[tuple[float, str]]


def latency(axes: "Axes", data: PlotData) -> None:
    """Time to first token and longest gap of each request, at its planned start."""
    from matplotlib.ticker import LogLocator

    for name, label, color in (
        ("ttft_s", "first token", COLORS[0]),
        ("longest_gap_s", "longest gap", COLORS[1]),
    ):
        points = [(row["at_s"], row[name] * 1e3) for row in data.requests if row[name] is not None]
        if not points:
            continue
        at, values = np.array(points).T
        axes.plot(at, values, ".", color=color, alpha=0.5, markersize=3.5, markeredgewidth=0)
        centres, p50, p99 = _windows(at, values)
        axes.plot(centres, p50, color=color, linewidth=1.4, label=f"{label}, median")
        axes.plot(centres, p99, color=color, linewidth=1.0, linestyle=":", label=f"{label}, P99")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("ms")


def in_progress(axes: "Axes", data: PlotData) -> None:
    """Running requests, and requests waiting for their first step."""
    at = [sample.at_s for sample in data.samples]
    for what, color in (("running", COLORS[0]), ("waiting", COLORS[1])):
        axes.plot(at, cluster_samples.totals(data.samples, what), color=color, linewidth=1.2, label=what)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("requests")


def instances(axes: "Axes", data: PlotData) -> None:
    """A bar for each instance, coloured by its state."""
    names = cluster_samples.names(data.samples)
    labelled: set[str] = set()
    for period in cluster_samples.periods(data.samples):
        label = period.state if period.state not in labelled else None
        labelled.add(period.state)
        axes.barh(
            names.index(period.instance),
            period.end_s - period.begin_s,
            left=period.begin_s,
            height=0.6,
            color=STATES.get(period.state, COLORS[-1]),
            label=label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def kv(axes: "Axes", data: PlotData) -> None:
    """KV blocks in use, per instance."""
    for number, name in enumerate(cluster_samples.names(data.samples)):
        at, share = cluster_samples.used_share(data.samples, name)
        style = "-" if number < len(COLORS) else "--"
        axes.plot(
            at, np.array(share) * 100, style, color=COLORS[number % len(COLORS)], linewidth=1.2, label=name
        )
    axes.set_ylim(0, 102)
    axes.set_ylabel("% of KV blocks")


def migrations(axes: "Axes", data: PlotData) -> None:
    """Cumulative migrations by reason, for the reasons that occurred."""
    at = [sample.at_s for sample in data.samples]
    committed, aborted = (cluster_samples.migrations(data.samples, what) for what in ("committed", "aborted"))
    reasons = [reason for reason in committed if committed[reason][-1] or aborted[reason][-1]]
    for reason, color in zip(reasons, itertools.cycle(COLORS), strict=False):
        axes.plot(at, committed[reason], color=color, linewidth=1.4, label=reason)
        if aborted[reason][-1]:
            axes.plot(
                at, aborted[reason], color=color, linewidth=1.0, linestyle=":", label=f"{reason}, aborted"
            )
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("migrations so far")


Panel = Callable[["Axes", PlotData], None]

#: By title.
PANELS: dict[str, Panel] = {
    "Latency of requests": latency,
    "Requests in progress": in_progress,
    "Instances": instances,
    "KV cache in use": kv,
    "Migrations": migrations,
}


def svgs(data: PlotData) -> dict[str, str]:
    """Each panel as an SVG document, by title."""
    return {title: _svg(title, data) for title in PANELS}


def picture(data: PlotData, path: Path) -> None:
    """All panels below each other, as one PNG."""
    wide, high = PANEL_INCHES
    figure = _figure(wide * 1.5, high * 0.75 * len(PANELS))
    for axes, title in zip(figure.subplots(len(PANELS), 1, sharex=True), PANELS, strict=True):
        _draw(axes, title, data, legend_columns=6)
        axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=100)


def _svg(title: str, data: PlotData) -> str:
    figure = _figure(*PANEL_INCHES)
    axes = figure.subplots()
    _draw(axes, title, data, legend_columns=3)
    axes.set_xlabel("seconds since the load began", fontsize=8)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def _figure(wide: float, high: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(wide, high), facecolor="white", layout="constrained")


def _draw(axes: "Axes", title: str, data: PlotData, legend_columns: int) -> None:
    PANELS[title](axes, data)
    for at_s, _ in data.events:
        axes.axvline(at_s, color="#a83250", linewidth=0.9, linestyle="--")
    axes.tick_params(which="both", labelsize=8)
    axes.yaxis.label.set_fontsize(8)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:  # above the axes, so that it covers no data
        corner = (1.0, 0.98)
        axes.legend(fontsize=7, frameon=False, ncols=legend_columns, loc="lower right", bbox_to_anchor=corner)


def _windows(at: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> tuple[list[float], ...]:
    """(middle, median, P99) series over the windows of `WINDOW_S` that are not empty."""
    number = np.floor(at / WINDOW_S)
    rows = [((n + 0.5) * WINDOW_S, *np.percentile(values[number == n], (50, 99))) for n in np.unique(number)]
    return tuple([float(row[part]) for row in rows] for part in range(3))
