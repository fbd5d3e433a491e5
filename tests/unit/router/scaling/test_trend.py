"""The trend of a pool's load, and the load that it leads to."""

import math
import random
from collections.abc import Callable

import pytest

from router.request import Demand
from router.scaling.trend import FITTED_S, MAX_GROWTH, LoadTrend, grown
from tests.unit.router.made_loads import decode, prefill


def trend_of(used: Callable[[float], float], seconds: int = 60) -> LoadTrend:
    """The trend of a pool of one instance whose used blocks are a function of the time."""
    trend = LoadTrend()
    for second in range(seconds + 1):
        trend.add([decode("d0", free=10_000 - round(used(second)), total=10_000)], float(second))
    return trend


def test_a_load_that_grows_is_forecast_along_its_line() -> None:
    trend = trend_of(lambda second: 1000 + 20 * second)

    assert trend.growth(0.0) == pytest.approx(1.0)
    assert trend.growth(60.0) == pytest.approx((2200 + 1200) / 2200, rel=0.01)


@pytest.mark.parametrize("slope", [0, -10])
def test_a_load_that_does_not_grow_stays(slope: int) -> None:
    assert trend_of(lambda second: 1000 + slope * second).growth(60.0) == 1.0


def test_a_forecast_is_bounded() -> None:
    assert trend_of(lambda second: 10 * second).growth(1000.0) == MAX_GROWTH


def test_without_enough_of_the_past_there_is_no_trend() -> None:
    assert LoadTrend().growth(60.0) == 1.0
    assert trend_of(lambda second: 100 * second, int(FITTED_S / 2) - 1).growth(60.0) == 1.0


def test_a_turn_shows_within_the_time_that_is_fitted() -> None:
    trend = trend_of(lambda second: 1000 + 20 * min(second, 300), 300 + int(FITTED_S) + 1)

    assert trend.growth(60.0) == pytest.approx(1.0, abs=0.01)


def test_prefill_instances_are_measured_by_the_time_in_steps() -> None:
    trend = LoadTrend()
    for second in range(61):
        trend.add([prefill("p0", busy=second / 100), prefill("p1", busy=second / 100)], float(second))

    assert trend.growth(30.0) == pytest.approx(1.5, rel=0.01)


def test_what_a_full_pool_does_not_get_is_part_of_its_trend() -> None:
    trend = LoadTrend()
    for second in range(61):
        full = decode("d0", free=0, total=1000)
        trend.add([full], float(second), Demand(second, blocks=10 * second))

    assert trend.growth(60.0) == pytest.approx((1600 + 600) / 1600, rel=0.01)


def test_a_grown_load_has_more_requests_and_less_room() -> None:
    load = grown(decode("d0", free=60, running=10, busy=0.5), 1.5)

    assert (load.free_blocks, load.running, load.busy) == (40, 15, 0.75)
    assert grown(decode("d0", free=10, running=10), 2.0).free_blocks == 0


def test_requests_that_come_at_random_are_hardly_a_trend() -> None:
    """Prompts of 0.27 s come at 3 a second, and the share of the last 10 s is measured, as on an instance."""
    dice = random.Random(3)
    trend, arrivals, growths = LoadTrend(), [0] * 10, []
    for second in range(2000):
        arrivals = [*arrivals[1:], sum(dice.random() < 0.03 for _ in range(100))]
        trend.add([prefill("p0", busy=0.27 * sum(arrivals) / 10)], float(second))
        growths.append(trend.growth(60.0))

    assert sum(growths) / len(growths) < 1.05
    assert max(growths) < 1.5


def test_reports_that_came_late_or_not_at_all_leave_no_trend() -> None:
    """Two points would be a line without an error."""
    trend = LoadTrend()
    for second in (0.0, 100.0):
        trend.add([decode("d0", free=round(100 - second))], second)
    assert trend.growth(60.0) == 1.0
    trend.add([], 110.0)
    assert trend.growth(60.0) == 1.0
    trend.add([decode("d0")], 1e9)
    assert trend.growth(60.0) == 1.0


def test_the_line_is_fitted_once_for_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler asks in every round, and there are many rounds a second."""
    trend = trend_of(lambda second: 1000 + 20 * second)
    fits = []
    monkeypatch.setattr(math, "sqrt", lambda value: fits.append(value) or value**0.5)

    assert trend.growth(60.0) == trend.growth(60.0) < trend.growth(90.0)
    trend.add([decode("d0", free=0, total=10_000)], 60.5)
    trend.growth(60.0)
    assert len(fits) == 1
    trend.add([decode("d0", free=0, total=10_000)], 61.0)
    trend.growth(60.0)
    assert len(fits) == 2
