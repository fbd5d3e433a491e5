"""Labels of the service on its metrics, so that a Prometheus tells several services apart."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class WithLabels(Collector):
    """The metrics of another collector, with further labels.

    Labels that a sample has already stay as they are: vLLM's have a `model_name`.

    Args:
        service: On each sample of pd-serve and vLLM, such as `service` and `model_name`.
        process: On each sample, such as `api_server`.
    """

    def __init__(
        self, collector: Collector, service: Mapping[str, str], process: Mapping[str, str] | None = None
    ) -> None:
        self._collector = collector
        self._process = dict(process or {})
        self._service = self._process | dict(service)

    def collect(self) -> Iterator[Metric]:
        for metric in self._collector.collect():
            is_ours = metric.name.startswith(("pd_serve_", "vllm:"))
            labels = self._service if is_ours else self._process
            yield _labelled(metric, labels) if labels else metric


def _labelled(metric: Metric, labels: Mapping[str, str]) -> Metric:
    labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    labelled.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in metric.samples]
    return labelled
