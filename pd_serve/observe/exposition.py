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


class WithInstances(Collector):
    """The metrics of another registry, with a label `instance` on samples of vLLM with a label `engine`.

    Samples of an engine number without an instance are left out.

    Args:
        instances: Gives the present instance ids by vLLM's engine number. Numbers are reused.
    """

    def __init__(
        self, instances: Callable[[], dict[str, str]], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._instances = instances
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        instances = self._instances()
        for metric in self._registry.collect():
            yield _named(metric, instances) if metric.name.startswith("vllm:") else metric


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

    def instances() -> dict[str, str]:
        return {str(slot): name for name, slot in report().slots.items()}

    for collector in (WithInstances(instances, registry), ClusterMetrics(report)):
        shown.register(WithServiceLabels(collector, labels or {}))

    async def metrics(request: Request) -> Response:
        # Runs on the event loop, as all code that changes these values. In the plain text format only:
        # in OpenMetrics format the library renames `vllm:` to `vllm_`.
        names = request.query_params.getlist("name[]")
        chosen = shown.restricted_registry(names) if names else shown
        return Response(generate_latest(chosen), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.router.routes.insert(0, Route("/metrics", metrics))


def _named(metric: Metric, instances: dict[str, str]) -> Metric:
    named = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    for sample in metric.samples:
        engine = sample.labels.get("engine")
        if engine is None:
            named.samples.append(sample)
        elif engine in instances:
            labels = {**sample.labels, "instance": instances[engine]}
            named.samples.append(sample._replace(labels=labels))
    return named
