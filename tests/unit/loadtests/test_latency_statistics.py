"""Means and percentiles of latencies."""

from loadtests.latency_statistics import statistics_ms


def test_statistics_are_in_milliseconds() -> None:
    found = statistics_ms([0.1 * n for n in range(1, 10)])

    assert found == {"mean": 500.0, "p50": 500.0, "p90": 820.0, "p99": 892.0, "max": 900.0}


def test_no_values_have_no_statistics() -> None:
    assert statistics_ms([], ("p50", "max")) == {"p50": None, "max": None}
