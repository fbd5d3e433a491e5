"""The service's own flags: what they become together, and which do not go together."""

import pytest

from pd_serve.config import (
    ServeConfig,
    instances_at_start,
    parse_bounds,
    parse_policies,
)
from pd_serve.errors import InvalidRequestError
from router.scaling import PoolBounds


@pytest.mark.parametrize(
    ("given", "bounds", "numbers"),
    [
        ((None, None, None), {}, (1, 2, 0)),
        ((2, None, None), {}, (2, 2, 0)),
        ((None, None, 0), {}, (1, 2, 0)),
        ((None, None, 3), {}, (0, 0, 3)),
        ((1, 1, 3), {}, (1, 1, 3)),
        ((None, None, None), {"decode": PoolBounds(1, 4)}, (1, 2, 0)),
        ((None, None, None), {"decode": PoolBounds(3, 4)}, (1, 3, 0)),
        ((None, None, None), {"decode": PoolBounds(1, 1), "prefill": PoolBounds(2, 3)}, (2, 1, 0)),
        ((None, None, None), {"neutral": PoolBounds(2, 5)}, (0, 0, 2)),
        ((None, None, 4), {"neutral": PoolBounds(2, 5)}, (0, 0, 4)),
    ],
)
def test_instances_at_the_start(
    given: tuple[int | None, ...], bounds: dict[str, PoolBounds], numbers: tuple[int, ...]
) -> None:
    instances = instances_at_start(*given, bounds)
    assert tuple(instances.values()) == numbers
    assert ServeConfig("tiny", instances, autoscale=bounds).num_instances == sum(numbers)


@pytest.mark.parametrize(
    ("instances", "bounds", "says"),
    [
        ((1, 5, 0), {"decode": PoolBounds(1, 4)}, "5 decode instances at the start are not within 1:4"),
        ((1, 2, 0), {"neutral": PoolBounds(1, 4)}, "0 neutral instances at the start are not within 1:4"),
        ((0, 2, 0), {}, "give --prefill"),
        ((1, 0, 0), {}, "give --decode"),
        ((-1, 0, 1), {}, "cannot be negative"),
    ],
)
def test_what_does_not_go_together(
    instances: tuple[int, ...], bounds: dict[str, PoolBounds], says: str
) -> None:
    numbers = dict(zip(("prefill", "decode", "neutral"), instances, strict=True))
    with pytest.raises(InvalidRequestError, match=says):
        ServeConfig("tiny", numbers, autoscale=bounds)


def test_there_may_be_as_many_as_the_bounds_say() -> None:
    bounds = {"decode": PoolBounds(1, 4)}
    assert ServeConfig("tiny", {"prefill": 2, "decode": 1, "neutral": 3}, autoscale=bounds).max_instances == 9


@pytest.mark.parametrize("text", ["3", "a:b", "1:", ":2", "1:2:3", "0:2", "3:2", "-1:2"])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--autoscale"):
        parse_bounds("--autoscale", text)


def test_bounds() -> None:
    assert parse_bounds("--autoscale", "2:2") == PoolBounds(2, 2)


def test_a_policy_with_other_settings() -> None:
    policies = parse_policies("llumnix", ["migration_threshold=5", "max_moves=2"])
    assert (policies.name, policies.migration_threshold, policies.max_moves) == ("llumnix", 5.0, 2)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("lumnix", [], "no policy 'lumnix'; there are"),
        ("llumnix", ["max_moves"], "--set max_moves: it has to be KEY=VALUE"),
        ("llumnix", ["moves=2"], "no setting 'moves'; there are"),
        ("llumnix", ["max_moves=many"], "max_moves"),
    ],
)
def test_a_policy_that_is_none(name: str, settings: list[str], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        parse_policies(name, settings)
