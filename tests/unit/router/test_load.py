"""What a load says, and how requests change it."""

from typing import Any

import pytest
from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad, slow_blocks
from tests.unit.router.made_loads import decode, neutral

LOAD = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60, running=4)


def test_the_mean_size_of_requests_is_rounded_up() -> None:
    assert neutral("i0", 40, 4).mean_blocks == 15
    assert decode("i0", 100, 0).mean_blocks == 0


def test_a_departure_undoes_an_arrival() -> None:
    taken = replace(LOAD, free_blocks=40, running=5)

    assert freeness(taken.with_departures(20)) == freeness(LOAD)


def test_an_instance_is_empty_without_requests_and_migrations() -> None:
    idle = decode("d0", running=0)

    assert idle.is_empty
    for busy in ({"running": 1}, {"waiting": 1}, {"migrating_in": 1}, {"migrating_out": 1}):
        assert not replace(idle, **busy).is_empty


def test_blocks_beyond_the_target_of_the_time_per_token_are_not_free() -> None:
    """100 blocks in use take a token from 10 to 16 ms: 250 take it to 25 ms."""
    load = InstanceLoad(
        "i0", "neutral", total_blocks=1000, free_blocks=900, running=5, token_s=0.016, least_step_s=0.010
    )

    assert slow_blocks(load, 0.025) == 750
    assert slow_blocks(load, 0.070) == 0  # memory is less
    assert slow_blocks(load, 0.013) == 950


@pytest.mark.parametrize(
    ("changes", "target_s"),
    [
        ({}, 0.0),  # no target
        ({}, 0.009),  # no number of instances would reach it
        ({"token_s": 0.0, "least_step_s": 0.0}, 0.025),  # nothing measured yet
        ({"running": 0, "free_blocks": 1000}, 0.025),
    ],
)
def test_without_a_measure_or_a_target_only_memory_counts(changes: dict[str, Any], target_s: float) -> None:
    load = InstanceLoad(
        "i0", "neutral", total_blocks=1000, free_blocks=900, running=5, token_s=0.016, least_step_s=0.010
    )

    assert slow_blocks(replace(load, **changes), target_s) == 0
