"""Means and percentiles of latencies, in milliseconds."""

from collections.abc import Callable, Sequence

import numpy as np

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "p50": lambda values: float(np.percentile(values, 50)),
    "p90": lambda values: float(np.percentile(values, 90)),
    "p99": lambda values: float(np.percentile(values, 99)),
    "max": max,
}


def statistics_ms(
    values_s: Sequence[float], names: Sequence[str] = tuple(STATISTICS)
) -> dict[str, float | None]:
    """Statistics of values in seconds, by name; None for each if there are no values."""
    return {name: to_ms(STATISTICS[name](values_s)) if len(values_s) else None for name in names}


def to_ms(seconds: float) -> float:
    """Milliseconds, rounded to a microsecond."""
    return round(seconds * 1e3, 3)
