"""Texts of settings: what they become, and what is refused."""

import math

import pytest

from pd_serve.setting_types import parse_bounds, parse_key_limits, parse_resources, parse_settings, parse_slo
from router.rate_limits import KeyLimits
from router.scaling import PoolBounds
from router.slo import Slo


@pytest.mark.parametrize("text", ["3", "a:b", "1:", ":2", "1:2:3", "0:2", "3:2", "-1:2"])
def test_bounds_must_be_two_numbers_in_order(text: str) -> None:
    with pytest.raises(ValueError, match=r"MIN:MAX|1 <= MIN <= MAX"):
        parse_bounds(text)


def test_bounds_may_be_equal() -> None:
    assert parse_bounds("2:2") == PoolBounds(2, 2)


@pytest.mark.parametrize("text", ["node_a", "[1]", '{"a": "x"}', '{"a": 0}', '{"a": NaN}', '{"CPU": 1}'])
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


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=3,itl=0.05", Slo(3.0, 0.05)),
        ("itl=50ms", Slo(math.inf, 0.05)),
        (" ttft=500ms ", Slo(0.5, math.inf)),
        ("tpot=.1s,ttft=1s", Slo(1.0, 0.1)),
    ],
)
def test_targets_are_one_or_two_times(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    "text",
    [
        *("", "ttft", "ttft=", "ttft=nan", "ttft=-1", "ttft=0", "ttft=inf", "ttft=1e300", "ttft=1,ttft=2"),
        *("itl=6", "itl=50", "ttft=1h", "e2e=3", "ttft=1;itl=1", "itl=1,tpot=2", "ttft=1,"),
    ],
)
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be such as|must be above 0"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("rpm=60,tpm=100000", KeyLimits(60, 100_000)),
        ("tpm=5", KeyLimits(math.inf, 5)),
        (" rpm=1", KeyLimits(1, math.inf)),
    ],
)
def test_limits_of_a_key_are_one_or_two_numbers(text: str, limits: KeyLimits) -> None:
    assert parse_key_limits(text) == limits


@pytest.mark.parametrize(
    "text", ["", "rpm", "rpm=0", "rpm=-1", "rpm=1.5", "rpm=1,rpm=2", "tps=3", "rpm=1;tpm=2"]
)
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be such as rpm=60,tpm=100000"):
        parse_key_limits(text)
