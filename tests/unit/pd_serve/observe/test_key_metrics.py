"""Metrics by API key, counted from the events of the recorder."""

import itertools

import pytest
from prometheus_client import REGISTRY

from pd_serve.observe.key_metrics import MAX_KEYS, OTHERS, KeyMetrics
from pd_serve.observe.recorder import RequestRecorder
from router.request import NewRequest

#: The registry is that of the process: each test has keys of its own.
serial = itertools.count()


@pytest.fixture
def name() -> str:
    return f"alice-{next(serial)}"


def counted(metric: str, key: str) -> float | None:
    return REGISTRY.get_sample_value(f"pd_serve_key_{metric}", {"key": key})


def test_a_key_has_its_series_before_its_first_request(name: str) -> None:
    KeyMetrics([name])

    for metric in ("requests", "prompt_tokens", "output_tokens", "refused_requests"):
        assert counted(f"{metric}_total", name) == 0
    assert counted("waiting_requests", name) == 0


def test_requests_and_tokens_count_at_the_end_of_a_request(name: str) -> None:
    recorder = RequestRecorder([KeyMetrics(["another", name])])
    recorder.issued("r", 0.0, NewRequest(100, account=1))
    recorder.dispatched("r", "p0", "prefill", 0.0)
    recorder.first_token_from("r", "p0", "prefill", 0.5)
    assert counted("requests_total", name) == 0

    recorder.ended("r", "stop", 1.0, tokens=7)

    numbers = [counted(f"{metric}_total", name) for metric in ("requests", "prompt_tokens", "output_tokens")]
    assert numbers == [1, 100, 7]


def test_a_request_waits_until_its_first_token_or_its_end(name: str) -> None:
    recorder = RequestRecorder([KeyMetrics([name])])
    waiting = []
    for request in ("served", "gone"):
        recorder.issued(request, 0.0, NewRequest(100))
        recorder.dispatched(request, "p0", "prefill", 0.0)
        waiting.append(counted("waiting_requests", name))
    recorder.lost("served", "p0", "died", 0.1)
    recorder.dispatched("served", "p1", "prefill", 0.2)
    waiting.append(counted("waiting_requests", name))
    recorder.first_token_from("served", "p1", "prefill", 0.5)
    recorder.first_token_from("served", "d0", "decode", 0.6)
    waiting.append(counted("waiting_requests", name))
    recorder.ended("gone", "abort", 0.7)
    recorder.ended("served", "stop", 1.0, tokens=9)
    recorder.ended("served", "stop", 1.0, tokens=9)
    waiting.append(counted("waiting_requests", name))

    assert waiting == [1, 2, 2, 1, 0]


def test_keys_of_one_name_count_together_and_those_beyond_the_limit_as_others(name: str) -> None:
    metrics = KeyMetrics([name, name, *(f"{name}-{number}" for number in range(MAX_KEYS))])
    before = counted("refused_requests_total", OTHERS) or 0.0

    for account in (0, 1, MAX_KEYS + 1, MAX_KEYS + 2):
        metrics.refused(account)

    assert counted("refused_requests_total", name) == 2
    assert counted("refused_requests_total", OTHERS) == before + 1


def test_without_keys_nothing_is_counted() -> None:
    before = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
    metrics = KeyMetrics([])
    recorder = RequestRecorder([metrics])
    recorder.issued("r", 0.0, NewRequest(100))
    recorder.ended("r", "error", 1.0)
    metrics.refused(0)

    assert {sample.name for metric in REGISTRY.collect() for sample in metric.samples} == before
