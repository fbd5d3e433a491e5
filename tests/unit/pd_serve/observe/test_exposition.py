"""How the text of `/metrics` is made."""

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pd_serve.observe.exposition import MetricsText
from tests.unit.pd_serve.observe.test_cluster_metrics import World


async def test_other_tasks_run_between_two_metrics() -> None:
    """The text of 64 instances takes a second."""
    registry, turns = CollectorRegistry(), 0
    for number in range(20):
        Gauge(f"pd_serve_{number}", "A gauge.", registry=registry).set(1)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    text = await MetricsText(World().report, {}, "api", registry).all()
    counting.cancel()

    assert text.count("# HELP ") > 20
    assert turns >= text.count("# HELP ")


async def test_who_asks_while_the_text_is_made_gets_the_same_and_who_gives_up_ends_it_for_nobody() -> None:
    class Counted(Collector):
        times = 0

        def collect(self) -> Iterator[Metric]:
            self.times += 1
            yield GaugeMetricFamily("pd_serve_times", "Times.", self.times)

    registry, counted = CollectorRegistry(), Counted()
    registry.register(counted)
    text, before = MetricsText(World().report, {}, "api", registry), counted.times

    gives_up, *others = [asyncio.create_task(text.all()) for _ in range(3)]
    await asyncio.sleep(0)
    gives_up.cancel()
    first, second = await asyncio.gather(*others)
    assert first == second
    assert counted.times == before + 1

    assert await text.all() != first
    assert counted.times == before + 2
