"""Writes the list of metrics into docs/metrics.md, from the code.

`python -m docs.metric_list` rewrites the part between the markers; `tests/unit/test_docs.py` compares it.
"""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from pd_serve.comm.cluster_state import (
    ClusterState,
    ProcessStats,
    RestartState,
    SchedulerState,
    SchedulerStats,
)
from pd_serve.comm.messages import InstanceStats
from pd_serve.observe import metrics
from pd_serve.observe.cluster_metrics import ApiServerMetrics, ClusterMetrics
from pd_serve.observe.cluster_report import ClusterReport
from pd_serve.observe.histogram import BatchHistogram
from router.load import InstanceLoad
from router.request import NO_DEMAND

PAGE = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- begin list -->\n", "<!-- end list -->\n"


def updated(page: str) -> str:
    """The page with the list as the code has it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("no markers for the list")
    return f"{before}{begin}{_table()}{end}{after}"


def _table() -> str:
    rows = ["| metric | type | labels | |", "|---|---|---|---|"]
    for title, found in (("each API server counts its own", _counted()), ("reported", _reported())):
        rows.append(f"| **{title}** | | | |")
        for metric, labels in found:
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `{_name(metric)}` | {metric.type} | {shown} | {metric.documentation} |")
    return "\n".join(rows) + "\n"


def metric_names() -> set[str]:
    """Names of all metrics, as queries use them: counters end in `_total`."""
    return {_name(metric) for metric, _ in (*_counted(), *_reported())}


def _name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _counted() -> Iterable[tuple[Metric, list[str]]]:
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            yield next(iter(value.describe())), list(value._labelnames)
        elif isinstance(value, BatchHistogram):
            yield next(value.describe()), []
    yield from _of(ApiServerMetrics(_report))


def _reported() -> Iterable[tuple[Metric, list[str]]]:
    yield from _of(ClusterMetrics(_report))


def _report() -> ClusterReport:
    load, process = (
        InstanceLoad("decode-0", "decode", total_blocks=100, free_blocks=50),
        ProcessStats(1.0, 1.0, 1.0),
    )
    errors = {"decode": 0}
    stats = SchedulerStats(process, 1, {"drain": 1}, {"drain": 1}, message_errors=errors)
    scheduler, restart = SchedulerState("alive", "", None, 0), RestartState(False, "")
    return ClusterReport(
        loads=[load],
        slots={"decode-0": 0},
        stats={
            "decode-0": InstanceStats(
                process,
                0,
                0,
                0,
                0,
                0,
                errors,
                refused_orders={"policy": 0},
                prefix_copies={"copied": 0},
                unmovable={"session": 0},
                orphans={"ended": 0},
            )
        },
        stranded={},
        waiting=NO_DEMAND,
        num_running=0,
        num_unsent=0,
        state=ClusterState([], scheduler, [], [], restart, scheduler_stats=stats, message_errors=errors),
        message_errors=errors,
    )


def _of(collector: Collector) -> Iterable[tuple[Metric, list[str]]]:
    for metric in collector.collect():
        yield metric, list(metric.samples[0].labels)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
