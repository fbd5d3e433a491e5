"""The trend of a pool's load: what it will be when an instance that is started now serves."""

import math
from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from router.load import InstanceLoad
from router.request import NO_DEMAND, Demand

#: Time over which the trend is fitted, in seconds, and the least time between two of its points.
FITTED_S, POINT_S = 120.0, 1.0

#: Points that say as much as one: loads are means over 10 s, or of requests that stay for longer.
POINTS_AS_ONE = 10

#: Greatest factor by which a forecast may exceed the present load.
MAX_GROWTH = 2.0


class LoadTrend:
    """A line through the loads of the last two minutes: short enough that a turn shows soon."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()
        self._line: tuple[float, float] | None = None

    def add(self, loads: Sequence[InstanceLoad], now: float, waiting: Demand = NO_DEMAND) -> None:
        """Takes the loads of a pool, and what it does not have yet, about once a second."""
        if self._points and now - self._points[-1][0] < POINT_S:
            return
        self._points.append((now, load_of(loads, waiting)))
        self._line = None
        while self._points[0][0] < now - FITTED_S:
            self._points.popleft()

    def growth(self, horizon_s: float) -> float:
        """Factor by which the load will have grown; at least 1: pools shrink by what is, not by forecasts."""
        if self._line is None:
            self._line = self._fitted()  # once for each point; a scheduler asks many times a second
        slope, present = self._line
        if slope <= 0 or present <= 0:
            return 1.0
        return min(1.0 + slope * horizon_s / present, MAX_GROWTH)

    def _fitted(self) -> tuple[float, float]:
        """The slope of the load, and the load at the last point; both 0 without a trend.

        Without half of the time to fit there is no trend. The slope counts less its standard error, since
        requests that come at random have slopes, too.
        """
        points = self._points
        if len(points) < 3 or points[-1][0] - points[0][0] < FITTED_S / 2:
            return 0.0, 0.0
        mean_at = sum(at for at, _ in points) / len(points)
        mean = sum(load for _, load in points) / len(points)
        spread = sum((at - mean_at) ** 2 for at, _ in points)
        slope = sum((at - mean_at) * (load - mean) for at, load in points) / spread
        present = mean + slope * (points[-1][0] - mean_at)
        rest = sum((load - mean - slope * (at - mean_at)) ** 2 for at, load in points)
        return slope - math.sqrt(POINTS_AS_ONE * rest / (len(points) - 2) / spread), present


def load_of(loads: Sequence[InstanceLoad], waiting: Demand) -> float:
    """The time that prefill instances are in steps, and the blocks that others use, of a whole pool.

    The blocks that are to be handed off count, too: a full pool would seem to have a load that stands still.
    """
    if all(load.role == "prefill" for load in loads):
        return sum(load.busy for load in loads)
    used = sum(load.total_blocks - load.free_blocks + load.waiting_blocks for load in loads)
    return float(used + waiting.blocks)


def grown(load: InstanceLoad, factor: float) -> InstanceLoad:
    """The load when there are that many times as many requests."""
    if factor == 1.0:
        return load
    used = load.total_blocks - load.free_blocks
    return replace(
        load,
        free_blocks=max(load.total_blocks - round(used * factor), 0),
        running=round(load.running * factor),
        busy=load.busy * factor,
    )
