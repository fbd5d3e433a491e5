"""Arrival times and how they are specified."""

import numpy as np
import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Arrivals, drawn, recorded, recorded_rate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gamma",
        "gamma:0",
        "gamma:x",
        "gamma:nan",
        "poisson:2",
        "uniform",
        "sine",
        "sine:2",
        "sine:0.5:9",
        "sine:2:0",
        "sine:2:9:1",
    ],
)
def test_unknown_arrivals_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be poisson, gamma:CV"):
        Arrivals.parse(text)


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("poisson", Arrivals("poisson")),
        ("gamma:2.5", Arrivals("gamma", 2.5)),
        ("sine:24:900", Arrivals("sine", ratio=24.0, period_s=900.0)),
        ("recorded", Arrivals("recorded")),
    ],
)
def test_arrivals_are_read_from_text(text: str, arrivals: Arrivals) -> None:
    assert Arrivals.parse(text) == arrivals


def test_recorded_times_begin_at_zero_and_take_a_rate() -> None:
    times = np.array([5.0, 6.0, 9.0])

    assert recorded(times, None).tolist() == [0, 1, 4]
    assert recorded_rate(recorded(times, 4.0)) == pytest.approx(4.0)


def test_requests_that_arrive_at_once_have_no_rate() -> None:
    with pytest.raises(InvalidRequestError, match="it has no rate"):
        recorded(np.array([3.0, 3.0]), 1.0)
    with pytest.raises(InvalidRequestError, match="it has no rate"):
        recorded_rate(np.array([3.0]))


def test_the_rate_of_recorded_times_does_not_depend_on_their_order() -> None:
    assert recorded_rate(np.array([6.0, 9.0, 5.0])) == 0.5
    assert recorded(np.array([6.0, 9.0, 5.0]), 1.0).tolist() == [0.5, 2, 0]


def test_a_sine_has_its_least_rate_at_the_beginning_and_the_greatest_half_a_period_later() -> None:
    times = drawn(Arrivals.parse("sine:24:900"), 12.5, 30_000, np.random.RandomState(0))

    def rate_at(second: float) -> float:
        return float(((times >= second - 20) & (times < second + 20)).sum() / 40)

    assert rate_at(900.0) == pytest.approx(1.0, abs=0.5)
    assert rate_at(450.0) == pytest.approx(24.0, rel=0.1)
    assert rate_at(1350.0) == pytest.approx(24.0, rel=0.1)
    assert recorded_rate(times[times < 1800.0]) == pytest.approx(12.5, rel=0.05)
    assert (np.diff(times) >= 0).all()
