"""Metrics of instances, scheduler and API server, made at every scrape from the latest reports.

A field of `InstanceLoad`, `InstanceStats` or `SchedulerStats` with a description is a metric. Its name is the
title in the field's `Meta`, or else the name of the field. `Meta` may also have

    extra={"kind": "counter"}   the number counts up; without it, it is a gauge
    extra={"label": "reason"}   the field is a dict, and its keys are values of this label
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, get_type_hints

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pd_serve.comm.cluster_state import MESSAGE_ERRORS, SchedulerStats
from pd_serve.comm.messages import InstanceStats
from pd_serve.observe.cluster_report import ClusterReport
from router.freeness import fragmented_blocks, freeness, virtual_usage
from router.load import ROLES, InstanceLoad

Family = GaugeMetricFamily | CounterMetricFamily

FAMILIES: dict[str, type[Family]] = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}

#: Labels of a sample and the report that it is made from.
Row = tuple[Sequence[str], Any]


@dataclass(frozen=True)
class ReportedMetric:
    """One metric of a report.

    Attributes:
        value: Takes the number from a report; with a label, a dict of numbers by its value.
    """

    name: str
    description: str
    value: Callable[[Any], Any]
    kind: str = "gauge"
    label: str | None = None

    def family(self, prefix: str, labels: Sequence[str], rows: Iterable[Row]) -> Family:
        """The metric with a sample for every row."""
        extra = [] if self.label is None else [self.label]
        family = FAMILIES[self.kind](f"{prefix}_{self.name}", self.description, labels=[*labels, *extra])
        for values, report in rows:
            value = self.value(report)
            if self.label is None:
                family.add_metric(values, value)
            else:
                for key, number in value.items():
                    family.add_metric([*values, key], number)
        return family


def metrics_of(report: type[msgspec.Struct], path: str = "") -> Iterator[ReportedMetric]:
    """The metrics of a report's fields, those of nested reports included."""
    for name, hint in get_type_hints(report, include_extras=True).items():
        found = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from metrics_of(hint, f"{path}{name}.")
        elif found and found[0].description:
            yield ReportedMetric(
                found[0].title or name, found[0].description, attrgetter(path + name), **found[0].extra or {}
            )


_INSTANCE_LABELS = ("instance", "role")
_LOAD = (
    ReportedMetric("freeness", "Free blocks per running request; higher is freer.", freeness),
    ReportedMetric("virtual_usage_blocks", "KV blocks used or claimed; +Inf while draining.", virtual_usage),
    *metrics_of(InstanceLoad),
)
_STATS = tuple(metrics_of(InstanceStats))
_SCHEDULER = tuple(metrics_of(SchedulerStats))


class ApiServerMetrics(Collector):
    """What one API server has itself. Args: `report` gives what is known now; called at every scrape."""

    def __init__(self, report: Callable[[], ClusterReport]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        yield _message_errors("api_server", report.message_errors)
        yield GaugeMetricFamily(
            "pd_serve_waiting_line_requests",
            "Requests that wait in the API server until an instance has room.",
            report.waiting.requests,
        )
        yield GaugeMetricFamily(
            "pd_serve_running_requests",
            "Requests of the API server in progress, waiting ones included.",
            report.num_running,
        )
        yield CounterMetricFamily(
            "pd_serve_unsent_messages",
            "Messages of the API server dropped because their receiver was not connected or did not read.",
            report.num_unsent,
        )


class ClusterMetrics(Collector):
    """What all API servers know. Args: `report` as above."""

    def __init__(self, report: Callable[[], ClusterReport]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        yield from self._instances(report)
        yield from self._cluster(report)
        yield from self._scheduler(report)

    def _instances(self, report: ClusterReport) -> Iterator[Metric]:
        loads = [((load.instance_id, load.role), load) for load in report.loads]
        info = GaugeMetricFamily(
            "pd_serve_instance_info",
            "1 for every instance; `engine` is its number in vLLM's metrics.",
            labels=[*_INSTANCE_LABELS, "engine"],
        )
        slots = report.slots
        for labels, load in loads:
            info.add_metric([*labels, str(slots.get(load.instance_id, ""))], 1)
        yield info
        for metric in _LOAD:
            yield metric.family("pd_serve_instance", _INSTANCE_LABELS, loads)
        stranded = ReportedMetric(
            "stranded",
            "Requests on a prefill instance that wait for a decode instance to take them.",
            lambda load: report.stranded.get(load.instance_id, 0),
        )
        yield stranded.family("pd_serve_instance", _INSTANCE_LABELS, loads)
        movable = ReportedMetric(
            "migration_enabled",
            "1 if requests can move from and to the instance; 0 if its model or layout does not allow it.",
            lambda load: float(load.instance_id not in report.immovable),
        )
        yield movable.family("pd_serve_instance", _INSTANCE_LABELS, loads)
        stats = [
            (labels, report.stats[load.instance_id])
            for labels, load in loads
            if load.instance_id in report.stats
        ]
        for metric in _STATS:
            yield metric.family("pd_serve_instance", _INSTANCE_LABELS, stats)

    def _cluster(self, report: ClusterReport) -> Iterator[Metric]:
        loads = report.loads
        wanted = report.state.wanted if report.state is not None else {}
        sizes = GaugeMetricFamily(
            "pd_serve_wanted_instances",
            "Instances that there should be at least: the size of a pool, or its lower bound if autoscaled.",
            labels=["role"],
        )
        ready = GaugeMetricFamily(
            "pd_serve_ready_instances", "Instances that serve, draining ones included.", labels=["role"]
        )
        for role in ROLES:
            sizes.add_metric([role], wanted.get(role, 0))
            ready.add_metric([role], sum(load.role == role for load in loads))
        yield from (sizes, ready)
        yield _message_errors("manager", report.state.message_errors if report.state is not None else {})
        yield GaugeMetricFamily(
            "pd_serve_fragmented_blocks",
            "Free KV blocks that would suffice for queued requests if they were on one instance.",
            fragmented_blocks(
                [load.head_of_line_blocks for load in loads], sum(load.free_blocks for load in loads)
            ),
        )

    def _scheduler(self, report: ClusterReport) -> Iterator[Metric]:
        stats = report.state.scheduler_stats if report.state is not None else None
        yield GaugeMetricFamily(
            "pd_serve_scheduler_up", "1 while the scheduler reports.", float(stats is not None)
        )
        for metric in _SCHEDULER:
            yield metric.family("pd_serve_scheduler", (), [] if stats is None else [((), stats)])
        yield CounterMetricFamily(
            "pd_serve_scheduler_restarts",
            "Schedulers started in place of one that died.",
            report.state.scheduler.restarts if report.state is not None else 0,
        )
        scaled = CounterMetricFamily(
            "pd_serve_scaled_instances",
            "Instances started, stopped and lost (died, or ended because they hung) while serving, by action "
            "(start, stop, lost) and role.",
            labels=["action", "role"],
        )
        counts = {(c.action, c.role): c.instances for c in report.state.scaled} if report.state else {}
        for action in ("start", "stop", "lost"):
            for role in ROLES:
                scaled.add_metric([action, role], counts.get((action, role), 0))
        yield scaled


def _message_errors(process: str, errors: Mapping[str, int]) -> CounterMetricFamily:
    failed = CounterMetricFamily(f"pd_serve_{process}_message_errors", MESSAGE_ERRORS, labels=["kind"])
    for kind, number in errors.items():
        failed.add_metric([kind], number)
    return failed
