"""The timeline of a run: faults, pauses of streams, streams in progress and instances over one time axis."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loadtests.chaos.injector import FaultRecord
from loadtests.chaos.schedule import Target
from loadtests.checked_load import PAUSE_S, StreamRecord
from loadtests.report import cluster_samples
from loadtests.report.cluster_samples import ClusterSample
from loadtests.report.plots import COLORS, PlotData, in_progress, instances

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KILL, FREEZE, BROKEN, FAILED = "#a83250", "#1f5fa8", "#d1702a", "#c0392b"

#: Inches: the width, the heights of the first three panels, and the least height of that of the instances,
#: which grows with their number.
_WIDE, _HIGH, _INSTANCES_HIGH, _INSTANCE_HIGH = 11.0, (1.8, 2.4, 1.4), 1.6, 0.13


def svg(
    streams: Sequence[StreamRecord], faults: Sequence[FaultRecord], samples: Sequence[ClusterSample]
) -> str:
    """The timeline as an SVG document."""
    from matplotlib.figure import Figure

    high = (*_HIGH, max(_INSTANCES_HIGH, _INSTANCE_HIGH * len(cluster_samples.names(samples))))
    figure = Figure(figsize=(_WIDE, sum(high)), facecolor="white", layout="constrained")
    panels = figure.subplots(len(high), 1, sharex=True, height_ratios=high)
    _faults(panels[0], faults)
    _pauses(panels[1], streams)
    if samples:
        data = PlotData(requests=(), samples=samples, events=())
        in_progress(panels[2], data)
        instances(panels[3], data)
    for axes in panels:
        for record in faults:
            color = KILL if record.fault.freeze_s is None else FREEZE
            axes.axvline(record.at_s, color=color, linewidth=0.4, alpha=0.5)
        axes.tick_params(which="both", labelsize=7)
        axes.yaxis.label.set_fontsize(8)
        axes.grid(True, color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    panels[-1].set_xlabel("seconds since the load began", fontsize=8)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def _faults(axes: "Axes", faults: Sequence[FaultRecord]) -> None:
    """A cross for each kill, a bar for each freeze, by kind of process."""
    kinds = [target for target in Target if any(target is hit.target for one in faults for hit in one.hits)]
    for record in faults:
        for hit in record.hits:
            row = kinds.index(hit.target)
            if record.fault.freeze_s is None:
                axes.plot(record.at_s, row, "x", color=KILL, markersize=6)
            else:
                length = max(record.until_s - record.at_s, 0.2)
                axes.barh(row, length, left=record.at_s, height=0.5, color=FREEZE, alpha=0.7)
    axes.set_yticks(range(len(kinds)), [str(kind) for kind in kinds])
    axes.invert_yaxis()


def _pauses(axes: "Axes", streams: Sequence[StreamRecord]) -> None:
    """A line from the begin to the end of each pause, at its length; a mark for each stream that failed."""
    from matplotlib.ticker import LogLocator

    pauses = [pause for stream in streams for pause in stream.pauses]
    lengths = [pause.length_s for pause in pauses]
    begins = [pause.begin_s for pause in pauses]
    ends = [pause.begin_s + pause.length_s for pause in pauses]
    axes.hlines(lengths, begins, ends, color=COLORS[0], linewidth=1.0, alpha=0.5, label="pause of a stream")
    for excused, color, label in ((True, BROKEN, "API server killed"), (False, FAILED, "failed")):
        at = [s.end_s for s in streams if s.outcome.error is not None and s.excused is excused]
        if at:
            axes.plot(at, [1.0] * len(at), "v", color=color, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_ylim(PAUSE_S, max(10.0, *lengths, 0.0) * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("pause in s")
