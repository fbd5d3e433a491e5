"""What processes use over time."""

import asyncio
import os

import pytest

from loadtests.growth import GrowthLimits
from loadtests.processes import ProcessKind, ServiceProcesses, Usage
from loadtests.soak.usage_series import UsageSeries


def series(memory_mib: list[float]) -> UsageSeries:
    """Of one instance."""
    made = UsageSeries(ServiceProcesses(), 1.0)
    made.samples = [
        (float(at), {5: (ProcessKind.INSTANCE, Usage(mib, 20 + at % 2, 9))})
        for at, mib in enumerate(memory_mib)
    ]
    return made


def test_growth_in_the_warm_up_does_not_count() -> None:
    assert series([100.0, 200.0, 300.0] + [400.0] * 9).problems(GrowthLimits()) == []


def test_growth_after_it_does() -> None:
    (problem,) = series([100.0 + 20 * at for at in range(20)]).problems(GrowthLimits())

    assert "instance (pid 5): memory grew" in problem


def test_one_high_sample_is_no_growth() -> None:
    assert series([100.0] * 19 + [900.0]).problems(GrowthLimits()) == []


def test_the_table_has_begin_and_end() -> None:
    assert series([100.0] * 8 + [110.0] * 8).table() == [
        {
            "kind": "instance",
            "pid": 5,
            "memory_mib": (100.0, 110.0),
            "descriptors": (20, 20),
            "threads": (9, 9),
        }
    ]


def test_no_samples_are_no_problem() -> None:
    assert series([]).problems(GrowthLimits()) == []
    assert series([]).table() == []


async def test_samples_are_taken_until_the_end() -> None:
    watched = UsageSeries(ServiceProcesses(os.getpid()), 0.01)
    sampling = asyncio.create_task(watched.sample())
    while len(watched.samples) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    sampling.cancel()

    assert all(os.getpid() in usage for _, usage in watched.samples)
    assert watched.samples[0][0] == pytest.approx(0.0, abs=5.0)
