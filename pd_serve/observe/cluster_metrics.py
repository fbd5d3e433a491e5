"""Metrics of instances and scheduler, read from their latest reports when somebody asks.

Every API server exports the same; over several of them take the maximum by `instance`.
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pd_serve.comm.messages import InstanceStats
from pd_serve.observe.cluster_reports import ClusterReports
from router.freeness import fragmented_blocks, freeness, virtual_usage
from router.load import ROLES, InstanceLoad

_LOAD: dict[str, tuple[str, Callable[[InstanceLoad], float]]] = {
    "freeness": ("Free blocks per running request; higher is freer.", freeness),
    "virtual_usage_blocks": ("KV blocks used or claimed; infinite while draining.", virtual_usage),
    "free_blocks": ("KV blocks free or evictable now.", lambda load: load.free_blocks),
    "total_blocks": ("KV blocks that requests can use.", lambda load: load.total_blocks),
    "waiting_blocks": ("KV blocks that all queued requests need.", lambda load: load.waiting_blocks),
    "running": ("Requests in the batch.", lambda load: load.running),
    "waiting": ("Requests queued for the batch.", lambda load: load.waiting),
    "waiting_tokens": ("Prompt tokens still to be computed.", lambda load: load.waiting_tokens),
    "preempted": ("Queued requests that have lost their blocks.", lambda load: load.preempted),
    "high_priority": ("Requests of high priority in the batch.", lambda load: load.high_priority),
    "draining": ("1 while it takes nothing new.", lambda load: load.draining),
    "migrating_in": ("Migrations arriving.", lambda load: load.migrating_in),
    "migrating_out": ("Migrations leaving.", lambda load: load.migrating_out),
    "reserved_blocks": ("KV blocks held for arriving requests.", lambda load: load.reserved_blocks),
    "suspended": ("Requests whose last blocks are moving away.", lambda load: load.suspended),
}

_STATS: dict[str, tuple[type[Metric], str, Callable[[InstanceStats], float]]] = {
    "offers": (CounterMetricFamily, "Requests that others wanted to move here.", lambda stats: stats.offers),
    "refused_offers": (CounterMetricFamily, "Offers refused here.", lambda stats: stats.refused_offers),
    "received_bytes": (
        CounterMetricFamily,
        "KV copied into its memory, aborted migrations included.",
        lambda stats: stats.bytes_received,
    ),
    "protocol_errors": (
        CounterMetricFamily,
        "Migration messages that made no sense; there should be none.",
        lambda stats: stats.protocol_errors,
    ),
    "cpu_seconds": (
        CounterMetricFamily,
        "CPU time of its process.",
        lambda stats: stats.process.cpu_seconds,
    ),
    "resident_memory_bytes": (
        GaugeMetricFamily,
        "Memory of its process.",
        lambda stats: stats.process.resident_bytes,
    ),
    "start_time_seconds": (
        GaugeMetricFamily,
        "Unix time at which its process began.",
        lambda stats: stats.process.started_at,
    ),
}


class ClusterMetrics(Collector):
    """Args: `reports` is what has been reported; read at every scrape."""

    def __init__(self, reports: ClusterReports) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        yield from self._instances()
        yield from self._pool()
        yield from self._scheduler()
        yield from self._owner()

    def _instances(self) -> Iterator[Metric]:
        loads, stats, labels = self._reports.loads, self._reports.stats, ["instance", "role"]
        info = GaugeMetricFamily(
            "pd_serve_instance_info",
            "1 for every instance; `engine` is what vLLM's metrics call it.",
            labels=["instance", "role", "engine"],
        )
        slots = self._reports.slots
        for load in loads:
            info.add_metric([load.instance_id, load.role, str(slots.get(load.instance_id, ""))], 1)
        yield info
        for name, (text, value) in _LOAD.items():
            family = GaugeMetricFamily(f"pd_serve_instance_{name}", text, labels=labels)
            for load in loads:
                family.add_metric([load.instance_id, load.role], value(load))
            yield family
        stranded = GaugeMetricFamily(
            "pd_serve_instance_stranded",
            "Requests that wait there for another instance to take them.",
            labels=labels,
        )
        for load in loads:
            stranded.add_metric(
                [load.instance_id, load.role], self._reports.stranded.get(load.instance_id, 0)
            )
        yield stranded
        for name, (kind, text, number) in _STATS.items():
            reported = kind(f"pd_serve_instance_{name}", text, labels=labels)  # type: ignore[call-arg]
            for load in loads:
                if (said := stats.get(load.instance_id)) is not None:
                    reported.add_metric([load.instance_id, load.role], number(said))  # type: ignore[attr-defined]
            yield reported

    def _pool(self) -> Iterator[Metric]:
        loads = self._reports.loads
        yield GaugeMetricFamily(
            "pd_serve_fragmented_blocks",
            "KV blocks that are free, would do for queued requests, and help none of them where they are.",
            fragmented_blocks(
                [load.head_of_line_blocks for load in loads], sum(load.free_blocks for load in loads)
            ),
        )
        yield GaugeMetricFamily(
            "pd_serve_waiting_line_requests",
            "Requests that wait in the API server until an instance has room.",
            self._reports.waiting.requests,
        )
        yield GaugeMetricFamily(
            "pd_serve_running_requests",
            "Requests of this API server in progress, waiting ones included.",
            self._reports.num_running,
        )

    def _scheduler(self) -> Iterator[Metric]:
        stats = self._reports.scheduler
        yield GaugeMetricFamily(
            "pd_serve_scheduler_up", "1 while the scheduler reports.", float(stats is not None)
        )
        yield GaugeMetricFamily(
            "pd_serve_scheduler_instances",
            "Instances that the scheduler has heard.",
            stats.instances if stats is not None else 0,
        )
        moves = CounterMetricFamily(
            "pd_serve_scheduler_moves", "Orders to move a request, by reason.", labels=["reason"]
        )
        decisions = CounterMetricFamily(
            "pd_serve_scheduler_decisions",
            "Decisions about instances (start, stop, drain, use_again, set_role).",
            labels=["decision"],
        )
        if stats is not None:
            for reason, count in stats.moves.items():
                moves.add_metric([reason], count)
            for decision, count in stats.scaling.items():
                decisions.add_metric([decision], count)
        yield moves
        yield decisions
        if stats is not None:
            yield CounterMetricFamily(
                "pd_serve_scheduler_cpu_seconds",
                "CPU time of the scheduler's process.",
                stats.process.cpu_seconds,
            )
            yield GaugeMetricFamily(
                "pd_serve_scheduler_resident_memory_bytes",
                "Memory of the scheduler's process.",
                stats.process.resident_bytes,
            )

    def _owner(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "pd_serve_scheduler_restarts",
            "Schedulers started in the place of a dead one.",
            self._reports.scheduler_restarts,
        )
        scaled = CounterMetricFamily(
            "pd_serve_scaled_instances",
            "Instances started and stopped while serving, by action (start, stop) and role.",
            labels=["action", "role"],
        )
        for action in ("start", "stop"):
            for role in ROLES:
                scaled.add_metric([action, role], self._reports.scaled.get((action, role), 0))
        yield scaled
