"""`/metrics`: vLLM's metrics with instance names, and the metrics of pd-serve."""

from collections.abc import Callable, Iterator, Mapping

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import REGISTRY, Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pd_serve.observe.cluster_metrics import ClusterMetrics
from pd_serve.observe.cluster_report import ClusterReport
from pd_serve.observe.service_labels import WithServiceLabels
from router.load import InstanceLoad


def _waiting(load: InstanceLoad, labels: Mapping[str, str]) -> float:
    return load.waiting if labels.get("reason", "capacity") == "capacity" else 0.0


#: vLLM's gauges of what an engine holds, from the load and the labels of a sample. vLLM sets them in each
#: step, so that they would keep what has left without a step: aborted, moved, or lost with its instance.
FROM_LOAD: Mapping[str, Callable[[InstanceLoad, Mapping[str, str]], float]] = {
    "vllm:num_requests_running": lambda load, labels: load.running - load.suspended,
    "vllm:num_requests_waiting": _waiting,
    "vllm:num_requests_waiting_by_reason": _waiting,
    "vllm:kv_cache_usage_perc": lambda load, labels: 1.0 - load.free_blocks / max(load.total_blocks, 1),
}


class WithInstances(Collector):
    """The metrics of another registry, with a label `instance` on samples of vLLM with a label `engine`.

    Samples of an engine number without an instance are left out. Gauges of an engine's state show the load
    that the instance has last reported.

    Args:
        report: Gives the present instances by vLLM's engine number, which is reused, and their loads.
    """

    def __init__(self, report: Callable[[], ClusterReport], registry: CollectorRegistry = REGISTRY) -> None:
        self._report = report
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        instances = {str(slot): name for name, slot in report.slots.items()}
        loads = {load.instance_id: load for load in report.loads}
        for metric in self._registry.collect():
            yield _shown(metric, instances, loads) if metric.name.startswith("vllm:") else metric


def show_metrics(
    app: FastAPI,
    report: Callable[[], ClusterReport],
    registry: CollectorRegistry = REGISTRY,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Serves the metrics of a registry and of the cluster, in place of vLLM's own `/metrics`.

    Args:
        labels: Of the service, on each sample of pd-serve and vLLM.
    """
    shown = CollectorRegistry(auto_describe=True)  # for `?name[]=`
    for collector in (WithInstances(report, registry), ClusterMetrics(report)):
        shown.register(WithServiceLabels(collector, labels or {}))

    async def metrics(request: Request) -> Response:
        # Runs on the event loop, as all code that changes these values. In the plain text format only:
        # in OpenMetrics format the library renames `vllm:` to `vllm_`.
        names = request.query_params.getlist("name[]")
        chosen = shown.restricted_registry(names) if names else shown
        return Response(generate_latest(chosen), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.router.routes.insert(0, Route("/metrics", metrics))


def _shown(metric: Metric, instances: Mapping[str, str], loads: Mapping[str, InstanceLoad]) -> Metric:
    shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    value = FROM_LOAD.get(metric.name)
    for sample in metric.samples:
        engine = sample.labels.get("engine")
        if engine is None:
            shown.samples.append(sample)
        elif engine in instances:
            name = instances[engine]
            sample = sample._replace(labels={**sample.labels, "instance": name})
            if value is not None:
                load = loads.get(name)  # None before its first report
                sample = sample._replace(value=0.0 if load is None else value(load, sample.labels))
            shown.samples.append(sample)
    return shown
