"""A scrape shows the latest reports."""

from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from fastapi.testclient import TestClient
from msgspec import Meta
from prometheus_client import CollectorRegistry, Counter, Gauge

from pd_serve.comm.cluster_state import (
    ClusterState,
    ProcessStats,
    RestartState,
    ScaledCount,
    SchedulerState,
    SchedulerStats,
)
from pd_serve.comm.messages import InstanceStats
from pd_serve.observe.cluster_metrics import ApiServerMetrics, ClusterMetrics, metrics_of
from pd_serve.observe.cluster_report import ClusterReport
from pd_serve.observe.exposition import MetricsText, merged, show_metrics
from router.load import InstanceLoad
from router.request import Demand

PROCESS = ProcessStats(cpu_seconds=7.0, resident_bytes=1000.0, started_at=5.0)
LOADS = [
    InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=30, running=2, head_of_line_blocks=40),
    InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60),
]


class World:
    """What an API server knows, as a test says."""

    def __init__(self) -> None:
        self.loads = list(LOADS)
        self.slots = {load.instance_id: slot for slot, load in enumerate(LOADS)}
        self.stats: dict[str, InstanceStats] = {}
        self.stranded: dict[str, int] = {}
        self.immovable: set[str] = set()
        self.message_errors: dict[str, int] = {}
        self.state: ClusterState | None = None
        self.registry = CollectorRegistry()
        self.registry.register(ClusterMetrics(self.report))
        self.registry.register(ApiServerMetrics(self.report))

    def report(self) -> ClusterReport:
        return ClusterReport(
            self.loads,
            self.slots,
            self.stats,
            self.stranded,
            Demand(3, 99),
            5,
            2,
            self.state,
            self.immovable,
            self.message_errors,
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"pd_serve_{name}", labels)


def state(scheduler_stats: SchedulerStats | None = None, **changed: Any) -> ClusterState:
    known: dict[str, Any] = {
        "starting": [],
        "scheduler": SchedulerState("alive", "llumnix", 7, 0),
        "scaled": [],
        "decisions": [],
        "restart": RestartState(False, ""),
    }
    return ClusterState(**(known | changed), scheduler_stats=scheduler_stats)


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
        assert value == metric.value(LOADS[0]), metric.name


def test_loads_waiting_and_running_requests_are_exported() -> None:
    world = World()

    assert world.value("instance_info", instance="d0", role="decode", engine="1") == 1
    assert world.value("instance_free_blocks", instance="p0", role="prefill") == 30
    assert world.value("instance_freeness", instance="p0", role="prefill") == (100 - 70 - 40) / 2
    assert world.value("waiting_line_requests") == 3
    assert world.value("running_requests") == 5
    assert world.value("unsent_messages_total") == 2
    assert world.value("fragmented_blocks") == 40


def test_an_instance_whose_engine_cannot_move_requests_is_exported() -> None:
    world = World()
    world.immovable = {"p0"}

    assert world.value("instance_migration_enabled", instance="p0", role="prefill") == 0
    assert world.value("instance_migration_enabled", instance="d0", role="decode") == 1


def test_message_errors_of_every_process_are_exported_by_kind() -> None:
    world = World()
    errors = {"decode": 2, "call": 1}
    world.message_errors = errors
    world.state = state(SchedulerStats(PROCESS, 2, {}, {}, message_errors=errors), message_errors=errors)
    world.stats["d0"] = InstanceStats(PROCESS, 0, 0, 0, 0, 0, message_errors=errors)

    for process in ("api_server", "manager", "scheduler"):
        assert world.value(f"{process}_message_errors_total", kind="decode") == 2
    labels = {"instance": "d0", "role": "decode"}
    assert world.value("instance_message_errors_total", kind="call", **labels) == 1


def test_statistics_of_an_instance_are_exported_until_it_leaves() -> None:
    world = World()
    stats = InstanceStats(
        PROCESS, offers=9, refused_offers=2, bytes_received=77, unsent_messages=3, protocol_errors=0
    )
    labels: dict[str, Any] = {"instance": "d0", "role": "decode"}
    assert world.value("instance_offers_total", **labels) is None

    world.stats["d0"], world.stranded["d0"] = stats, 1

    assert world.value("instance_offers_total", **labels) == 9
    assert world.value("instance_received_bytes_total", **labels) == 77
    assert world.value("instance_cpu_seconds_total", **labels) == 7.0
    assert world.value("instance_stranded", **labels) == 1

    world.loads.pop()
    assert world.value("instance_offers_total", **labels) is None


def test_requests_that_cannot_move_are_exported_by_reason() -> None:
    world = World()
    world.stats["d0"] = InstanceStats(PROCESS, 0, 0, 0, 0, 0, unmovable={"session": 2, "pooling": 0})

    labels = {"instance": "d0", "role": "decode"}
    assert world.value("instance_unmovable_requests", reason="session", **labels) == 2
    assert world.value("instance_unmovable_requests", reason="pooling", **labels) == 0


def test_statistics_of_the_scheduler_are_exported_while_it_is_alive() -> None:
    world = World()
    assert world.value("scheduler_up") == 0

    world.state = state(SchedulerStats(PROCESS, 2, {"balance": 4}, {"drain": 1}))

    assert world.value("scheduler_up") == 1
    assert world.value("scheduler_moves_total", reason="balance") == 4
    assert world.value("scheduler_decisions_total", decision="drain") == 1

    world.state = state()
    assert world.value("scheduler_up") == 0
    assert world.value("scheduler_moves_total", reason="balance") is None


def test_restarts_and_scaling_of_the_manager_are_exported() -> None:
    world = World()
    assert world.value("scaled_instances_total", action="start", role="decode") == 0

    scheduler = SchedulerState("alive", "llumnix", 7, restarts=2)
    world.state = state(scheduler=scheduler, scaled=[ScaledCount("start", "decode", 3)])

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
    show_metrics(app, MetricsText(world.report, {}, "api", vllms))

    accepts = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}  # as Prometheus
    with TestClient(app, headers=accepts) as client:
        text = client.get("/metrics").text
        assert 'vllm:running{engine="0",instance="p0",model_name="tiny"} 1.0' in text
        assert 'engine="2"' not in text
        assert 'other{api_server="api",engine="0"} 1.0' in text
        assert 'pd_serve_instance_total_blocks{instance="p0",role="prefill"} 100.0' in text

        world.slots = {"d7": 0, "d0": 1}
        assert 'vllm:running{engine="0",instance="d7",model_name="tiny"} 1.0' in client.get("/metrics").text
        named = client.get("/metrics", params={"name[]": "pd_serve_scheduler_up"}).text
        assert [line for line in named.splitlines() if line[0] != "#"] == ["pd_serve_scheduler_up 0.0"]


def test_vllms_gauges_show_the_last_report_and_not_the_last_step() -> None:
    """A request that is aborted, moves away, or is lost with its instance, leaves without a step."""
    world, vllms, app = World(), CollectorRegistry(), FastAPI()
    gauges = {
        name: Gauge(f"vllm:{name}", "A gauge.", ["engine"], registry=vllms)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }
    for gauge in gauges.values():
        for engine in ("0", "1"):
            gauge.labels(engine).set(9)  # by the last step
    by_reason = Gauge("vllm:num_requests_waiting_by_reason", "Why.", ["engine", "reason"], registry=vllms)
    by_reason.labels("0", "capacity").set(9)
    by_reason.labels("0", "deferred").set(9)
    show_metrics(app, MetricsText(world.report, {}, "api", vllms))

    def shown(client: TestClient) -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:")]
        return {name.removeprefix("vllm:"): float(value) for name, value in found}

    with TestClient(app) as client:
        world.loads = [
            InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=25, running=3, suspended=1, waiting=4)
        ]
        assert shown(client) == {
            'num_requests_running{engine="0",instance="p0"}': 2,
            'num_requests_running{engine="1",instance="d0"}': 0,  # in the place of one that died
            'num_requests_waiting{engine="0",instance="p0"}': 4,
            'num_requests_waiting{engine="1",instance="d0"}': 0,
            'kv_cache_usage_perc{engine="0",instance="p0"}': 0.75,
            'kv_cache_usage_perc{engine="1",instance="d0"}': 0,
            'num_requests_waiting_by_reason{engine="0",instance="p0",reason="capacity"}': 4,
            'num_requests_waiting_by_reason{engine="0",instance="p0",reason="deferred"}': 0,
        }
        world.loads = [InstanceLoad(name, "decode", total_blocks=9, free_blocks=9) for name in world.slots]
        assert set(shown(client).values()) == {0}


def test_what_each_api_server_counts_has_its_name_and_what_all_know_is_shown_once() -> None:
    registries = [CollectorRegistry(), CollectorRegistry()]
    texts = []
    for number, registry in enumerate(registries):
        Counter("pd_serve_requests", "Requests.", ["outcome"], registry=registry).labels("stop").inc(
            number + 1
        )
        Counter("vllm:tokens", "Tokens.", ["engine"], registry=registry).labels("0").inc(10)
        Gauge("vllm:num_requests_running", "Running.", ["engine"], registry=registry).labels("0").set(1)
        Gauge("python_info", "Python.", registry=registry).set(1)
        texts.append(MetricsText(World().report, {"service": "chat"}, f"api-{number}", registry))

    async def of_others() -> list[str]:
        return [await texts[1].own()]

    app = FastAPI()
    show_metrics(app, texts[0], of_others)
    with TestClient(app) as client:
        lines = client.get("/metrics").text.splitlines()
        alone = client.get("/metrics", params={"only": "self"}).text
        named = client.get("/metrics", params={"name[]": "pd_serve_requests_total"}).text.splitlines()

    assert "api-1" not in alone
    assert 'pd_serve_requests_total{api_server="api-0"' in alone
    assert "pd_serve_instance_total_blocks{" in alone

    def of(name: str) -> list[str]:
        return [line.removeprefix(name) for line in lines if line.startswith(name)]

    assert of("pd_serve_requests_total") == [
        '{api_server="api-0",outcome="stop",service="chat"} 1.0',
        '{api_server="api-1",outcome="stop",service="chat"} 2.0',
    ]
    assert of("vllm:tokens_total") == [
        '{api_server="api-0",engine="0",instance="p0",service="chat"} 10.0',
        '{api_server="api-1",engine="0",instance="p0",service="chat"} 10.0',
    ]
    assert of("python_info") == ['{api_server="api-0"} 1.0', '{api_server="api-1"} 1.0']
    assert len(of("pd_serve_running_requests")) == 2
    assert of("vllm:num_requests_running") == ['{engine="0",instance="p0",service="chat"} 2.0']
    assert len(of("pd_serve_instance_total_blocks")) == 2, "one for each instance"
    for name in ("pd_serve_requests_total", "python_info", "pd_serve_running_requests"):
        assert len(of(f"# HELP {name} ")) == len(of(f"# TYPE {name} ")) == 1
    assert [line.partition("{")[0] for line in named] == [
        "# HELP pd_serve_requests_total Requests.",
        "# TYPE pd_serve_requests_total counter",
        "pd_serve_requests_total",
        "pd_serve_requests_total",
    ]


async def test_texts_in_labels_do_not_tear_a_metric_apart() -> None:
    registry = CollectorRegistry()
    Gauge("pd_serve_a", "A.\n# HELP pd_serve_b B.", ["text"], registry=registry).labels(
        "x\n# HELP pd_serve_c C."
    ).set(1)
    text = await MetricsText(World().report, {}, "api", registry).own()

    assert merged([text]) == text
    assert merged([text, text]).count("# HELP pd_serve_a A") == 1
