"""Arrival times of requests."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pd_serve.errors import InvalidRequestError

Seconds = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Distribution of the arrival times.

    Attributes:
        kind: "poisson", "gamma", or "recorded" (the times of the trace file).
        cv: Coefficient of variation of the gaps, for "gamma".
    """

    kind: str
    cv: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Arrivals":
        """From `poisson`, `gamma:CV` or `recorded`.

        Raises:
            InvalidRequestError: The text is none of these.
        """
        kind, _, parameter = text.partition(":")
        if kind in ("poisson", "recorded") and not parameter:
            return cls(kind)
        try:
            cv = float(parameter)
        except ValueError:
            cv = 0.0
        if kind != "gamma" or not 0 < cv < float("inf"):
            raise InvalidRequestError(
                f"arrivals {text!r}: must be poisson, gamma:CV with a CV above 0, or recorded"
            )
        return cls(kind, cv)


def drawn(arrivals: Arrivals, rate: float, count: int, dice: np.random.RandomState) -> Seconds:
    """Arrival times with Gamma-distributed gaps of shape 1/CV² and mean 1/rate; Poisson has CV 1.

    The first request arrives at 0.
    """
    shape = arrivals.cv**-2
    times = np.cumsum(dice.gamma(shape, 1 / (rate * shape), count))
    return np.asarray(times - times[0])


def recorded(times: Seconds, rate: float | None) -> Seconds:
    """The times of a file, shifted to begin at 0 and scaled to a mean rate.

    Args:
        rate: Mean requests/s; None keeps the rate of the file.

    Raises:
        InvalidRequestError: All requests arrive at once, so the trace has no rate.
    """
    times = times - times[0]
    if rate is None:
        return times
    if times[-1] <= 0:
        raise InvalidRequestError("all requests of the trace arrive at once, so it has no rate")
    return np.asarray(times * (recorded_rate(times) / rate))


def recorded_rate(times: Seconds) -> float:
    """Mean rate of recorded arrivals, in requests/s."""
    return (len(times) - 1) / float(times[-1] - times[0])
