"""Labels of the service on its metrics, so that a Prometheus tells several services apart."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class WithServiceLabels(Collector):
    """The metrics of another collector, with labels on each sample of pd-serve and vLLM.

    Labels that a sample has already stay as they are: vLLM's have a `model_name`.

    Args:
        labels: Such as `service` and `model_name`.
    """

    def __init__(self, collector: Collector, labels: Mapping[str, str]) -> None:
        self._collector = collector
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for metric in self._collector.collect():
            yield self._labelled(metric) if metric.name.startswith(("pd_serve_", "vllm:")) else metric

    def _labelled(self, metric: Metric) -> Metric:
        labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
        labelled.samples = [
            sample._replace(labels={**self._labels, **sample.labels}) for sample in metric.samples
        ]
        return labelled
