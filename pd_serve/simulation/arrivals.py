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
        kind: "poisson", "gamma", "sine" (Poisson, at a rate that goes up and down), or "recorded" (the times
            of the trace file).
        cv: Coefficient of variation of the gaps, for "gamma".
        ratio, period_s: Greatest rate divided by the least one, and the time between two of the least, for
            "sine".
    """

    kind: str
    cv: float = 1.0
    ratio: float = 1.0
    period_s: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Arrivals":
        """From `poisson`, `gamma:CV`, `sine:RATIO:PERIOD_S` or `recorded`.

        Raises:
            InvalidRequestError: The text is none of these.
        """
        kind, _, parameter = text.partition(":")
        if kind in ("poisson", "recorded") and not parameter:
            return cls(kind)
        try:
            numbers = [float(number) for number in parameter.split(":")]
        except ValueError:
            numbers = []
        if all(0 < number < float("inf") for number in numbers):
            if kind == "gamma" and len(numbers) == 1:
                return cls(kind, numbers[0])
            if kind == "sine" and len(numbers) == 2 and numbers[0] >= 1:
                return cls(kind, ratio=numbers[0], period_s=numbers[1])
        raise InvalidRequestError(
            f"arrivals {text!r}: must be poisson, gamma:CV with a CV above 0, sine:RATIO:PERIOD_S with a"
            " ratio of at least 1, or recorded"
        )


def drawn(arrivals: Arrivals, rate: float, count: int, dice: np.random.RandomState) -> Seconds:
    """Arrival times with Gamma-distributed gaps of shape 1/CV² and mean 1/rate; Poisson has CV 1.

    The first request arrives at 0. `rate` is the mean of a sine over its periods.
    """
    if arrivals.kind == "sine":
        times = _of_sine(arrivals, rate, np.cumsum(dice.exponential(1.0, count)))
        return np.asarray(times - times[0])
    shape = arrivals.cv**-2
    times = np.cumsum(dice.gamma(shape, 1 / (rate * shape), count))
    return np.asarray(times - times[0])


def _of_sine(arrivals: Arrivals, rate: float, expected: Seconds) -> Seconds:
    """The times until which this many requests are expected, for a rate that begins at its least."""
    swing, turn = (arrivals.ratio - 1) / (arrivals.ratio + 1), 2 * np.pi / arrivals.period_s
    grid = np.arange(0.0, expected[-1] / rate + 2 * arrivals.period_s, arrivals.period_s / 1000)
    return np.interp(expected, rate * (grid - swing / turn * np.sin(turn * grid)), grid)


def recorded(times: Seconds, rate: float | None) -> Seconds:
    """The times of a file, shifted to begin at 0 and scaled to a mean rate.

    Args:
        rate: Mean requests/s; None keeps the rate of the file.

    Raises:
        InvalidRequestError: All requests arrive at once, so the trace has no rate.
    """
    times = times - times.min()
    if rate is None:
        return times
    return np.asarray(times * (recorded_rate(times) / rate))


def recorded_rate(times: Seconds) -> float:
    """Mean rate of recorded arrivals, in requests/s.

    Raises:
        InvalidRequestError: All requests arrive at once, so the trace has no rate.
    """
    if not (span := float(times.max() - times.min())):
        raise InvalidRequestError(
            "all requests of the trace arrive at once, so it has no rate: give --rate and --arrivals poisson"
        )
    return (len(times) - 1) / span
