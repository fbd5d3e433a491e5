"""How many instances may be kept nearly empty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.headroom import limit_headroom
from router.load import InstanceLoad
from tests.unit.router.made_loads import clusters

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
