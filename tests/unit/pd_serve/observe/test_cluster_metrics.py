"""A scrape shows the latest reports."""

from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from fastapi.testclient import TestClient
from msgspec import Meta
from prometheus_client import CollectorRegistry, Gauge

from migration.messages import RequestId
from pd_serve.comm.messages import (
    InstanceInfo,
    InstanceStats,
    LoadReport,
    ProcessStats,
    SchedulerReport,
    SchedulerStats,
)
from pd_serve.observe.cluster_metrics import ClusterMetrics, metrics_of
from pd_serve.observe.cluster_reports import SCHEDULER_LEASE_S, ClusterReports
from pd_serve.observe.exposition import show_metrics
from router.load import InstanceLoad
from router.request import Demand

PROCESS = ProcessStats(cpu_seconds=7.0, resident_bytes=1000.0, started_at=5.0)
LOADS = [
    InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=30, running=2, head_of_line_blocks=40),
    InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60),
]


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.reports = ClusterReports(lambda: Demand(3, 99), lambda: 5, lambda: self.now)
        for slot, load in enumerate(LOADS):
            self.join(load.instance_id, slot)
            self.reports.on_load(load.instance_id, LoadReport(load, []))
        self.registry = CollectorRegistry()
        self.registry.register(ClusterMetrics(self.reports))

    def join(self, instance_id: str, slot: int) -> None:
        info = InstanceInfo(instance_id, "decode", "", "node", 1, None, ["generate"], 8192, 100, 16)
        self.reports.joined(info, slot)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"pd_serve_{name}", labels)


class ToyStats(msgspec.Struct):
    """A report of an instance, with a field of every kind."""

    hot: Annotated[int, Meta(description="Hot blocks.")]
    swaps: Annotated[int, Meta(title="swapped", description="Swaps.", extra={"kind": "counter"})]
    by_cause: Annotated[
        dict[str, int], Meta(description="By cause.", extra={"kind": "counter", "label": "cause"})
    ]
    process: ProcessStats
    internal: int = 0


def test_every_field_with_a_description_is_a_metric() -> None:
    report = ToyStats(3, 4, {"full": 5, "busy": 6}, PROCESS)
    families = [metric.family("toy", ["instance"], [(["i0"], report)]) for metric in metrics_of(ToyStats)]
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }

    assert samples == {
        ("toy_hot", "i0"): 3,
        ("toy_swapped_total", "i0"): 4,
        ("toy_by_cause_total", "i0", "full"): 5,
        ("toy_by_cause_total", "i0", "busy"): 6,
        ("toy_cpu_seconds_total", "i0"): 7.0,
        ("toy_resident_memory_bytes", "i0"): 1000.0,
        ("toy_start_time_seconds", "i0"): 5.0,
    }
    assert [family.documentation for family in families[:2]] == ["Hot blocks.", "Swaps."]


def test_every_described_number_of_a_load_report_is_exported() -> None:
    world = World()

    for metric in metrics_of(InstanceLoad):
        value = world.value(f"instance_{metric.name}", instance="p0", role="prefill")
        assert value == getattr(LOADS[0], metric.name), metric.name


def test_loads_waiting_and_running_requests_are_exported() -> None:
    world = World()

    assert world.value("instance_info", instance="d0", role="decode", engine="1") == 1
    assert world.value("instance_free_blocks", instance="p0", role="prefill") == 30
    assert world.value("instance_freeness", instance="p0", role="prefill") == (100 - 70 - 40) / 2
    assert world.value("waiting_line_requests") == 3
    assert world.value("running_requests") == 5
    assert world.value("fragmented_blocks") == 40


def test_statistics_of_an_instance_are_exported_until_it_leaves() -> None:
    world = World()
    stats = InstanceStats(PROCESS, offers=9, refused_offers=2, bytes_received=77, protocol_errors=0)
    labels: dict[str, Any] = {"instance": "d0", "role": "decode"}
    assert world.value("instance_offers_total", **labels) is None

    world.reports.on_load("d0", LoadReport(LOADS[1], [RequestId("r")], stats))
    world.reports.on_load("d0", LoadReport(LOADS[1], [RequestId("r")]))

    assert world.value("instance_offers_total", **labels) == 9
    assert world.value("instance_received_bytes_total", **labels) == 77
    assert world.value("instance_cpu_seconds_total", **labels) == 7.0
    assert world.value("instance_stranded", **labels) == 1

    world.reports.left("d0")
    assert world.value("instance_offers_total", **labels) is None


def test_statistics_of_the_scheduler_are_exported_until_its_lease_ends() -> None:
    world = World()
    assert world.value("scheduler_up") == 0

    world.reports.on_scheduler(SchedulerReport([], SchedulerStats(PROCESS, 2, {"balance": 4}, {"drain": 1})))
    world.reports.on_scheduler(SchedulerReport(["d0 is drained: x"]))

    assert world.value("scheduler_up") == 1
    assert world.value("scheduler_moves_total", reason="balance") == 4
    assert world.value("scheduler_decisions_total", decision="drain") == 1

    world.now += 2 * SCHEDULER_LEASE_S
    assert world.value("scheduler_up") == 0
    assert world.value("scheduler_moves_total", reason="balance") is None


def test_restarts_and_scaling_of_the_manager_are_exported() -> None:
    world = World()
    assert world.value("scaled_instances_total", action="start", role="decode") == 0

    scaled = [{"action": "start", "role": "decode", "instances": 3}]
    world.reports.on_manager({"scheduler": {"restarts": 2}, "scaled": scaled})

    assert world.value("scaled_instances_total", action="start", role="decode") == 3
    assert world.value("scaled_instances_total", action="stop", role="decode") == 0
    assert world.value("scheduler_restarts_total") == 2


def test_vllms_metrics_get_the_instance_that_has_their_engine_number() -> None:
    """Samples of unused numbers are left out. Instances that join later reuse numbers."""
    world, vllms, app = World(), CollectorRegistry(), FastAPI()
    gauge = Gauge("vllm:running", "Running.", ["engine", "model_name"], registry=vllms)
    for engine in ("0", "1", "2"):
        gauge.labels(engine, "tiny").set(1)
    Gauge("other", "Other.", ["engine"], registry=vllms).labels("0").set(1)
    show_metrics(app, world.reports, vllms)

    accepts = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}  # as Prometheus
    with TestClient(app, headers=accepts) as client:
        text = client.get("/metrics").text
        assert 'vllm:running{engine="0",instance="p0",model_name="tiny"} 1.0' in text
        assert 'engine="2"' not in text
        assert 'other{engine="0"} 1.0' in text
        assert 'pd_serve_instance_total_blocks{instance="p0",role="prefill"} 100.0' in text

        world.reports.left("p0")
        world.join("d7", 0)
        assert 'vllm:running{engine="0",instance="d7",model_name="tiny"} 1.0' in client.get("/metrics").text
        named = client.get("/metrics", params={"name[]": "pd_serve_scheduler_up"}).text
        assert [line for line in named.splitlines() if line[0] != "#"] == ["pd_serve_scheduler_up 0.0"]
