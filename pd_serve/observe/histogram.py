"""A histogram that counts equal values together."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry


class BatchHistogram(Collector):
    """A Prometheus histogram for the tokens of an engine step, most of which have the same gap.

    Not thread-safe: observations and scrapes must run on one event loop.

    Args:
        buckets: Upper bounds in ascending order, without +Inf.
    """

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = list(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip([*self._bounds, math.inf], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else str(float(bound)), total))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
