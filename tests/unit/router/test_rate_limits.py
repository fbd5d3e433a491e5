"""Limits per minute: what is taken, given back and overdrawn, and when there is enough again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.rate_limits import KeyLimits, RateLimits

A, B = 0, 1


def limits(rpm: float = math.inf, tpm: float = math.inf, accounts: int = 2) -> RateLimits:
    return RateLimits([KeyLimits(rpm, tpm)] * accounts)


def test_a_minutes_requests_may_come_at_once_and_no_more() -> None:
    found = limits(rpm=3)
    assert [found.take(A, 1, 10, 0.0) for _ in range(3)] == [None] * 3

    lacking = found.take(A, 1, 10, 0.0)

    assert lacking is not None
    assert (lacking.name, lacking.limit) == ("requests", 3)
    assert lacking.wait_s == pytest.approx(20.0)
    assert found.take(B, 1, 10, 0.0) is None


def test_after_the_time_to_wait_there_is_enough() -> None:
    found = limits(rpm=3, tpm=600)
    for _ in range(3):
        found.take(A, 1, 200, 0.0)
    lacking = found.take(A, 1, 200, 5.0)
    assert lacking is not None

    assert found.take(A, 1, 200, 5.0 + lacking.wait_s - 0.01) is not None
    assert found.take(A, 1, 200, 5.0 + lacking.wait_s + 0.01) is None


def test_a_refusal_takes_nothing_and_names_the_later_limit() -> None:
    found = limits(rpm=100, tpm=1000)
    found.take(A, 1, 800, 0.0)

    lacking = found.take(A, 1, 300, 0.0)

    assert lacking is not None
    assert lacking.name == "tokens"
    assert found.take(A, 1, 200, 0.0) is None


def test_what_is_given_back_can_be_taken_again() -> None:
    found = limits(rpm=1, tpm=100)
    found.take(A, 1, 100, 0.0)

    found.give_back(A, 1, 100)

    assert found.take(A, 1, 100, 0.0) is None


def test_outputs_overdraw_and_are_paid_before_the_next_request() -> None:
    found = limits(tpm=600)
    found.take(A, 1, 100, 0.0)
    found.generated(A, 1100)

    [budget] = found.budgets(A, 0.0)
    lacking = found.take(A, 1, 100, 0.0)

    assert (budget.remaining, lacking is not None) == (-600, True)
    assert lacking is not None
    assert lacking.wait_s == pytest.approx(70.0)


def test_a_prompt_longer_than_the_limit_waits_for_a_whole_minute() -> None:
    found = limits(tpm=600)
    found.take(A, 1, 60, 0.0)

    assert found.take(A, 1, 10_000, 5.9) is not None
    assert found.take(A, 1, 10_000, 6.1) is None
    assert found.take(A, 1, 1, 6.1) is not None


def test_many_prompts_of_one_request_wait_like_one_that_needs_as_much() -> None:
    """They are taken one after the other. More than the whole limit would never pass otherwise."""
    found = limits(rpm=3, tpm=100)
    for before in range(5):
        assert found.take(A, 1, 40, 0.0, taken=(before, 40 * before)) is None

    assert found.take(A, 1, 40, 0.0) is not None
    found.give_back(A, 5, 200)
    assert found.take(A, 1, 40, 0.0) is None

    lacking = found.take(A, 3, 10, 0.0)
    assert lacking is not None
    assert lacking.wait_s == pytest.approx(20.0)


def test_each_of_several_api_servers_has_its_part() -> None:
    found = limits(rpm=4)
    found.num_servers = 2
    taken = [found.take(A, 1, 1, 0.0) for _ in range(3)]
    assert [one is None for one in taken] == [True, True, False]
    assert taken[2] is not None
    assert taken[2].wait_s == pytest.approx(30.0)


def test_a_limit_below_one_request_for_each_api_server_lets_some_pass() -> None:
    found = limits(rpm=1)
    found.num_servers = 3
    assert found.take(A, 1, 1, 0.0) is None
    assert found.take(A, 1, 1, 179.0) is not None
    assert found.take(A, 1, 1, 180.1) is None


def test_without_limits_nothing_is_refused() -> None:
    assert limits().take(A, 10**6, 10**9, 0.0) is None
    assert RateLimits([]).take(5, 10**6, 10**9, 0.0) is None
    assert limits().budgets(A, 0.0) == []


def test_a_clock_that_goes_back_gives_nothing() -> None:
    found = limits(rpm=1)
    found.take(A, 1, 1, 100.0)
    assert found.take(A, 1, 1, 0.0) is not None


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 400)), max_size=60))
def test_no_minute_has_more_than_twice_the_limit(requests: list[tuple[float, int]]) -> None:
    """A full bucket and what a minute brings; whatever the pattern of arrivals."""
    found, now, taken = limits(tpm=1000), 0.0, []
    for pause_s, tokens in requests:
        now += pause_s
        if found.take(A, 1, tokens, now) is None:
            taken.append((now, tokens))
    for begin, _ in taken:
        assert sum(tokens for at, tokens in taken if begin <= at < begin + 60.0) <= 2000
