"""Growth of processes."""

from loadtests.growth import GrowthLimits, ended, grown
from loadtests.processes import ProcessKind, Usage

LIMITS = GrowthLimits(memory_share=0.1, memory_mib=10.0, descriptors=4, threads=2)
BEFORE = {1: (ProcessKind.INSTANCE, Usage(200.0, 50, 20)), 2: (ProcessKind.OTHER, Usage(50.0, 9, 3))}


def test_growth_within_the_limits_is_none() -> None:
    after = {1: (ProcessKind.INSTANCE, Usage(229.0, 54, 22)), 2: (ProcessKind.OTHER, Usage(10.0, 1, 1))}

    assert grown(BEFORE, after, LIMITS) == []


def test_what_grows_is_named() -> None:
    after = {1: (ProcessKind.INSTANCE, Usage(231.0, 55, 23))}

    assert grown(BEFORE, after, LIMITS) == [
        "instance (pid 1): memory grew from 200 to 231 MiB",
        "instance (pid 1): descriptors grew from 50 to 55",
        "instance (pid 1): threads grew from 20 to 23",
    ]


def test_a_process_that_ended_is_named_if_it_is_one_of_the_service() -> None:
    assert ended(BEFORE, {}) == ["instance (pid 1) has ended"]
    assert ended(BEFORE, BEFORE) == []
