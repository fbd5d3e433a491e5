"""The share of requests that meet their targets, of the last minute."""

import pytest

from pd_serve.observe.attainment import WINDOW_S, Attainment
from pd_serve.observe.timeline import Timeline
from router.slo import NO_SLO, Slo
from tests.manual_clock import ManualClock

TARGETS = Slo(1.0, 0.1)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def attainment(clock: ManualClock) -> Attainment:
    return Attainment(clock)


def end(attainment: Attainment, ttft_s: float, slo: Slo = TARGETS, outcome: str = "stop") -> None:
    times = {"first_token_at": ttft_s, "ended_at": ttft_s}
    attainment.ended(Timeline("r", "r", 0.0, 10, 0, slo=slo, outcome=outcome, **times))


def test_requests_with_targets_count_and_others_do_not(attainment: Attainment) -> None:
    end(attainment, 9.0, NO_SLO)
    assert attainment.counts == (0, 0)
    for ttft_s in (0.5, 0.9, 1.1):
        end(attainment, ttft_s)
    end(attainment, 0.5, outcome="error")
    assert attainment.counts == (4, 2)


def test_what_is_more_than_a_minute_ago_counts_no_more(attainment: Attainment, clock: ManualClock) -> None:
    end(attainment, 0.5)
    clock.now += WINDOW_S - 1
    end(attainment, 1.5)
    assert attainment.counts == (2, 1)
    clock.now += 1
    assert attainment.counts == (1, 0)
    clock.now += 1e6
    assert attainment.counts == (0, 0)


def test_its_size_is_bounded_and_a_clock_that_jumps_loses_a_minute_at_most(
    attainment: Attainment, clock: ManualClock
) -> None:
    for _ in range(10 * WINDOW_S):
        clock.now += 1
        end(attainment, 0.5)
        end(attainment, 0.5)
    assert attainment.counts == (2 * WINDOW_S, 2 * WINDOW_S)
    clock.now -= 3600
    assert attainment.counts == (0, 0)
    end(attainment, 1.5)
    assert attainment.counts == (1, 0)
    for _ in range(WINDOW_S):
        clock.now += 1
        end(attainment, 0.5)
    assert attainment.counts == (WINDOW_S, WINDOW_S)
