"""Virtual usage and freeness."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.freeness import (
    dispatch_freeness,
    freeness,
    headroom,
    limit_headroom,
    pooled_freeness,
    virtual_usage,
)
from router.load import InstanceLoad
from tests.unit.router.made_loads import clusters, loads, neutral, scaled

LOAD = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60, running=4)
PAPER = InstanceLoad("i0", "neutral", total_blocks=851, free_blocks=811, running=2)


def test_freeness_is_free_blocks_per_running_request() -> None:
    assert virtual_usage(LOAD) == 40
    assert freeness(LOAD) == (100 - 40) / 4


def test_the_head_of_the_line_counts_with_what_it_needs_and_those_behind_it_do_not() -> None:
    """A queued request claims blocks that are free by the numbers."""
    queued = replace(LOAD, waiting=3, head_of_line_blocks=20, waiting_blocks=70)

    assert virtual_usage(queued) == 60
    assert freeness(queued) == (100 - 60) / 4


def test_dispatch_counts_the_whole_queue() -> None:
    queued = replace(LOAD, waiting=3, head_of_line_blocks=20, waiting_blocks=70, watermark_blocks=1)

    assert dispatch_freeness(queued) == (60 - 1 - 70) / (4 + 3)


def test_a_head_of_the_line_that_does_not_fit_makes_freeness_negative() -> None:
    assert freeness(replace(LOAD, head_of_line_blocks=80)) == -5.0


def test_demand_on_its_way_counts_like_use() -> None:
    assert virtual_usage(LOAD.with_arrivals(20)) == 60
    assert freeness(LOAD.with_arrivals(20)) == freeness(LOAD, 20, 1) == (100 - 60) / 5
    assert dispatch_freeness(LOAD.with_arrivals(20)) == (100 - 60) / 5


def test_a_draining_instance_holds_a_request_of_infinite_usage() -> None:
    draining = replace(LOAD, draining=True)

    assert virtual_usage(draining) == math.inf
    assert freeness(draining) == dispatch_freeness(draining) == -math.inf


def test_high_priority_keeps_the_real_load_near_1600_tokens() -> None:
    """Headroom is counted once, however many there are; 1,600 tokens are 100 blocks of 16."""
    one, two = replace(PAPER, high_priority=1), replace(PAPER, high_priority=2)

    assert headroom(PAPER) == 0
    assert headroom(one) == headroom(two) == 751
    assert freeness(one) == (100 - 40) / 2
    assert freeness(replace(one, free_blocks=751)) == 0.0
    assert dispatch_freeness(one) == (100 - 40) / 2
    assert headroom(replace(one, block_tokens=32)) == 801
    assert headroom(replace(one, total_blocks=50)) == 0


@pytest.mark.parametrize("running", [0, 1])
def test_an_idle_instance_counts_as_a_batch_of_one(running: int) -> None:
    idle = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=100, running=running)

    assert freeness(idle) == dispatch_freeness(idle) == 100.0


@given(loads())
def test_an_idle_instance_is_the_freest_of_its_kind(load: InstanceLoad) -> None:
    idle = InstanceLoad("d1", "decode", total_blocks=load.total_blocks, free_blocks=load.total_blocks)

    assert freeness(load) <= freeness(idle)
    assert dispatch_freeness(load) <= dispatch_freeness(idle)


@given(loads(), st.integers(1, 100))
def test_more_demand_is_more_usage(load: InstanceLoad, blocks: int) -> None:
    if not load.draining:
        assert virtual_usage(load.with_arrivals(blocks)) == virtual_usage(load) + blocks
        assert freeness(load.with_arrivals(blocks)) == freeness(load, blocks, 1)
        assert virtual_usage(replace(load, head_of_line_blocks=load.head_of_line_blocks + blocks)) == (
            virtual_usage(load) + blocks
        )


@given(loads(), st.sampled_from([2, 4, 16]))
def test_freeness_grows_with_scale(load: InstanceLoad, factor: int) -> None:
    """So the order of two instances does not depend on what a block is."""
    assert freeness(scaled(load, factor)) == freeness(load) * factor
    assert dispatch_freeness(scaled(load, factor)) == dispatch_freeness(load) * factor


POOL = [
    InstanceLoad(f"i{number}", "decode", total_blocks=100, free_blocks=50, running=5, high_priority=number)
    for number in range(10)
]


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.0, []), (0.01, ["i9"]), (0.25, ["i8", "i9"]), (1.0, [f"i{n}" for n in range(1, 10)])],
)
def test_instances_with_the_most_high_priority_keep_headroom(share: float, kept: list[str]) -> None:
    limited = limit_headroom(POOL, share)

    assert [load.instance_id for load in limited] == [load.instance_id for load in POOL]
    assert [load.instance_id for load in limited if load.high_priority] == kept


def test_each_pool_has_its_own_limit_of_headroom() -> None:
    neutral = [replace(load, instance_id=f"n{load.instance_id}", role="neutral") for load in POOL]

    kept = [load.instance_id for load in limit_headroom([*POOL, *neutral], 0.1) if load.high_priority]
    assert kept == ["i9", "ni9"]


@given(clusters(), st.floats(0, 1))
def test_limiting_headroom_changes_nothing_else(cluster: list[InstanceLoad], share: float) -> None:
    for before, after in zip(cluster, limit_headroom(cluster, share), strict=True):
        assert after in (before, replace(before, high_priority=0))


def test_freeness_is_the_lesser_of_what_memory_and_time_leave() -> None:
    memory = neutral("i0", 900, 5, total=1000)
    time = neutral("i0", 900, 5, total=1000, slow_blocks=750)

    assert freeness(memory) == 180
    assert freeness(time) == dispatch_freeness(time) == pooled_freeness([time]) == 30
