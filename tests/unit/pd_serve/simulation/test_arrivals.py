"""Arrival times and how they are specified."""

import numpy as np
import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Arrivals, recorded, recorded_rate


@pytest.mark.parametrize("text", ["", "gamma", "gamma:0", "gamma:x", "gamma:nan", "poisson:2", "uniform"])
def test_unknown_arrivals_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be poisson, gamma:CV"):
        Arrivals.parse(text)


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("poisson", Arrivals("poisson")),
        ("gamma:2.5", Arrivals("gamma", 2.5)),
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
