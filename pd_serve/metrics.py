"""The service's own metrics, beside vLLM's on `/metrics`: what no engine knows of itself."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.freeness import freeness, virtual_usage
from router.load import InstanceLoad
from router.request import Demand

MIGRATIONS = Counter(
    "pd_serve_migrations",
    "Migrations that have ended, by reason (handoff, manual, ...) and outcome (committed, aborted).",
    ["reason", "outcome"],
)
MIGRATED_BLOCKS = Counter(
    "pd_serve_migrated_blocks", "KV blocks of requests that have moved, by reason.", ["reason"]
)
DOWNTIME = Histogram(
    "pd_serve_migration_downtime_seconds",
    "Gap between the last token from the source and the first from the destination.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
RECOMPUTED = Counter("pd_serve_recomputed_requests", "Requests recomputed because their instance died.")

SCHEDULER_RESTARTS = Counter("pd_serve_scheduler_restarts", "Schedulers started in the place of a dead one.")
SCALED = Counter(
    "pd_serve_scaled_instances",
    "Instances started and stopped while serving, by action (start, stop) and role.",
    ["action", "role"],
)


class LoadCollector(Collector):
    """Gauges per instance, read from the latest load reports when somebody asks; and of the line of requests
    that no instance has yet."""

    def __init__(self, loads: Callable[[], Iterable[InstanceLoad]], waiting: Callable[[], Demand]) -> None:
        self._loads = loads
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        labels = ["instance", "role"]
        gauges: dict[str, tuple[str, Callable[[InstanceLoad], float]]] = {
            "freeness": ("Free blocks per running request; higher is freer.", freeness),
            "virtual_usage_blocks": ("KV blocks used or claimed.", virtual_usage),
            "total_blocks": ("KV blocks that requests can use.", lambda load: load.total_blocks),
            "running": ("Requests in the batch.", lambda load: load.running),
            "waiting": ("Requests queued for the batch.", lambda load: load.waiting),
            "draining": ("1 while it takes nothing new.", lambda load: load.draining),
            "migrating_in": ("Migrations arriving.", lambda load: load.migrating_in),
            "migrating_out": ("Migrations leaving.", lambda load: load.migrating_out),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"pd_serve_instance_{name}", text, labels=labels)
            for load in self._loads():
                family.add_metric([load.instance_id, load.role], value(load))
            yield family
        yield GaugeMetricFamily(
            "pd_serve_waiting_line_requests",
            "Requests that wait in the API server until an instance has room.",
            self._waiting().requests,
        )


def watch_loads(loads: Callable[[], Iterable[InstanceLoad]], waiting: Callable[[], Demand]) -> LoadCollector:
    """Registers the gauges. The caller unregisters the collector when it closes."""
    collector = LoadCollector(loads, waiting)
    REGISTRY.register(collector)
    return collector


def forget_loads(collector: LoadCollector) -> None:
    REGISTRY.unregister(collector)
