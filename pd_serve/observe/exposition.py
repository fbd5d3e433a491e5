"""`/metrics`: vLLM's metrics with instance names, and the metrics of pd-serve, of all API servers.

What an API server counts itself has its name in a label `api_server`. It is asked for at every scrape: a
series never shows an older number than before, and ends with its API server. What instances and scheduler
report, each API server knows, and the one that answers shows it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import REGISTRY, Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pd_serve.observe.cluster_metrics import ApiServerMetrics, ClusterMetrics
from pd_serve.observe.cluster_report import ClusterReport
from pd_serve.observe.service_labels import WithLabels
from router.load import InstanceLoad

#: Beginning of the text of a metric.
HEAD = "# HELP "


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
        process: Labels of what the process counts itself: of all but vLLM's gauges, which are about engines.
        of_engines: Whether to show vLLM's gauges, too.
    """

    def __init__(
        self,
        report: Callable[[], ClusterReport],
        registry: CollectorRegistry,
        process: Mapping[str, str],
        *,
        of_engines: bool,
    ) -> None:
        self._report = report
        self._registry = registry
        self._process = process
        self._of_engines = of_engines

    def collect(self) -> Iterator[Metric]:
        report = self._report()
        instances = {str(slot): name for name, slot in report.slots.items()}
        loads = {load.instance_id: load for load in report.loads}
        for metric in self._registry.collect():
            is_of_engines = metric.name.startswith("vllm:") and metric.type == "gauge"
            if self._of_engines or not is_of_engines:
                yield _shown(metric, instances, loads, {} if is_of_engines else self._process)


class MetricsText:
    """The metrics that one API server shows, as Prometheus' text.

    Who asks while the text is being made gets the same text: where it takes longer than a scrape may, scrapes
    that were given up would add to the work of the next one, until none is in time.

    Args:
        report: Gives what is known now; called at every scrape.
        labels: Of the service, on each sample of pd-serve and vLLM.
        api_server: Name of this API server.
    """

    def __init__(
        self,
        report: Callable[[], ClusterReport],
        labels: Mapping[str, str],
        api_server: str,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        name = {"api_server": api_server}
        counted = WithLabels(ApiServerMetrics(report), labels, name)
        self._own = [WithLabels(WithInstances(report, registry, name, of_engines=False), labels), counted]
        self._all = [
            WithLabels(WithInstances(report, registry, name, of_engines=True), labels),
            counted,
            WithLabels(ClusterMetrics(report), labels),
        ]
        self._making: dict[str, asyncio.Task[str]] = {}

    async def own(self) -> str:
        """What this API server counts itself."""
        return await self._made("own", self._own)

    async def all(self) -> str:
        """What this API server counts itself, and what all API servers know."""
        return await self._made("all", self._all)

    async def _made(self, name: str, collectors: Sequence[Collector]) -> str:
        if (making := self._making.get(name)) is None:
            making = self._making[name] = asyncio.create_task(_text_of(collectors))
            making.add_done_callback(lambda _: self._making.pop(name))
        return await asyncio.shield(making)


def merged(texts: Iterable[str], names: Sequence[str] = ()) -> str:
    """One text of several, with all samples of a metric together.

    Args:
        names: Of the samples to keep; all of them without any.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        for metric in f"\n{text}".split(f"\n{HEAD}")[1:]:
            help_text, type_text, *samples = metric.rstrip("\n").split("\n")
            if names:
                samples = [line for line in samples if line.partition("{")[0].partition(" ")[0] in names]
            known = found.setdefault(help_text.partition(" ")[0], [])
            known += samples if known else [f"{HEAD}{help_text}", type_text, *samples]
    return "".join(f"{line}\n" for lines in found.values() if len(lines) > 2 or not names for line in lines)


def show_metrics(
    app: FastAPI, text: MetricsText, of_others: Callable[[], Awaitable[Iterable[str]]] | None = None
) -> None:
    """Serves the metrics of all API servers, in place of vLLM's own `/metrics`.

    With `?only=self` those of this one: for a Prometheus that scrapes each of them.

    Args:
        of_others: Returns what the other API servers count themselves; None if there are none.
    """

    async def metrics(request: Request) -> Response:
        # In the plain text format only: in OpenMetrics format the library renames `vllm:` to `vllm_`.
        others: Iterable[str] = ()
        if of_others is not None and request.query_params.get("only") != "self":
            others = await of_others()
        texts, names = [await text.all(), *others], request.query_params.getlist("name[]")
        if len(texts) > 1 or names:
            texts = [await asyncio.to_thread(merged, texts, names)]
        return Response(texts[0], media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.router.routes.insert(0, Route("/metrics", metrics))


class _OneMetric(CollectorRegistry):
    """A registry of one metric that has been collected."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


async def _text_of(collectors: Iterable[Collector]) -> str:
    """Runs on the event loop, as all code that changes these values. Other tasks run between two metrics.

    The metrics of 64 instances together take a second.
    """
    texts: list[str] = []
    for collector in collectors:
        for metric in collector.collect():
            texts.append(generate_latest(_OneMetric(metric)).decode())
            await asyncio.sleep(0)
    return "".join(texts)


def _shown(
    metric: Metric,
    instances: Mapping[str, str],
    loads: Mapping[str, InstanceLoad],
    process: Mapping[str, str],
) -> Metric:
    shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    value = FROM_LOAD.get(metric.name)
    for sample in metric.samples:
        engine = sample.labels.get("engine") if metric.name.startswith("vllm:") else None
        if engine is None:
            shown.samples.append(sample._replace(labels={**process, **sample.labels}))
        elif engine in instances:
            name = instances[engine]
            sample = sample._replace(labels={**process, **sample.labels, "instance": name})
            if value is not None:
                load = loads.get(name)  # None before its first report
                sample = sample._replace(value=0.0 if load is None else value(load, sample.labels))
            shown.samples.append(sample)
    return shown
