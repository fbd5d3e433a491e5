"""Virtual usage and freeness."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.load import InstanceLoad, freeness

LOAD = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60, running=4)


@st.composite
def loads(draw: st.DrawFn) -> InstanceLoad:
    total = draw(st.integers(1, 10_000))
    return InstanceLoad(
        "d0",
        "decode",
        total_blocks=total,
        free_blocks=draw(st.integers(0, total)),
        running=draw(st.integers(0, 256)),
        head_of_line_blocks=draw(st.integers(0, total)),
    )


def test_freeness_is_what_is_free_per_running_request() -> None:
    assert LOAD.virtual_usage == 40
    assert freeness(LOAD) == (100 - 40) / 4


def test_the_head_of_the_line_counts_with_what_it_needs() -> None:
    """A queued request claims blocks that are free by the numbers."""
    queued = replace(LOAD, waiting=3, head_of_line_blocks=20)

    assert queued.virtual_usage == 60
    assert freeness(queued) == (100 - 60) / 4


def test_a_head_of_the_line_that_does_not_fit_makes_freeness_negative() -> None:
    assert freeness(replace(LOAD, head_of_line_blocks=80)) == -5.0


def test_demand_on_its_way_counts_like_use() -> None:
    assert freeness(LOAD, extra_blocks=20) == freeness(replace(LOAD, free_blocks=40))


@pytest.mark.parametrize("running", [0, 1])
def test_an_idle_instance_counts_as_a_batch_of_one(running: int) -> None:
    idle = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=100, running=running)

    assert freeness(idle) == 100.0


@given(loads())
def test_an_idle_instance_is_the_freest_of_its_kind(load: InstanceLoad) -> None:
    idle = InstanceLoad("d1", "decode", total_blocks=load.total_blocks, free_blocks=load.total_blocks)

    assert freeness(load) <= freeness(idle)


@given(loads(), st.integers(1, 100))
def test_more_demand_is_less_freeness(load: InstanceLoad, blocks: int) -> None:
    assert freeness(load, blocks) < freeness(load)
    assert freeness(load, blocks) == freeness(
        replace(load, head_of_line_blocks=load.head_of_line_blocks + blocks)
    )
