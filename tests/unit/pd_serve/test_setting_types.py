"""Texts of settings: what they become, and what is refused."""

import pytest

from pd_serve.setting_types import parse_bounds, parse_resources, parse_settings
from router.scaling import PoolBounds


@pytest.mark.parametrize("text", ["3", "a:b", "1:", ":2", "1:2:3", "0:2", "3:2", "-1:2"])
def test_bounds_must_be_two_numbers_in_order(text: str) -> None:
    with pytest.raises(ValueError, match=r"MIN:MAX|1 <= MIN <= MAX"):
        parse_bounds(text)


def test_bounds_may_be_equal() -> None:
    assert parse_bounds("2:2") == PoolBounds(2, 2)


@pytest.mark.parametrize("text", ["node_a", "[1]", '{"a": "x"}', '{"a": 0}', '{"CPU": 1}'])
def test_resources_must_be_custom_ones_with_amounts(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|custom resource"):
        parse_resources(text)


def test_settings_of_a_policy_become_numbers_where_they_are() -> None:
    assert parse_settings(["a=3", "b=0.5", "c = guarded", "d=true"]) == {
        "a": 3,
        "b": 0.5,
        "c": "guarded",
        "d": "true",
    }
