"""The size of a pool."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.load import InstanceLoad
from router.policies import policy_set
from router.request import Demand
from router.scaling import Decision, Drain, PoolBounds, PoolScaler, Start, Stop

PAPER = policy_set("llumnix-paper")


def load(name: str, free: int = 400, running: int = 10, role: str = "neutral", **other: int) -> InstanceLoad:
    return InstanceLoad(name, role, total_blocks=851, free_blocks=free, running=running, **other)


def pool(count: int, free: int, running: int) -> list[InstanceLoad]:
    return [load(f"i{number}", free, running) for number in range(count)]


# ---- a pool


class Pool:
    """A scaler, looked at once per second."""

    def __init__(self, least: int, most: int, policy: str = "llumnix-paper", **overrides: float) -> None:
        self.scaler = PoolScaler("neutral", PoolBounds(least, most), policy_set(policy, **overrides))
        self.now = 0.0

    def look(self, loads: Sequence[InstanceLoad], seconds: float = 1.0, starting: int = 0) -> list[Decision]:
        decisions: list[Decision] = []
        for _ in range(round(seconds)):
            self.now += 1.0
            decisions += self.scaler.decide(loads, starting, self.now)
        return decisions


IDLE = [load(f"i{number}", 851, 0) for number in range(3)]
FULL = pool(3, 0, 90)


def test_a_pool_that_has_just_changed_is_left_alone_for_a_while() -> None:
    scaled_pool = Pool(1, 8)

    assert scaled_pool.look(FULL, 9) == []
    assert len(scaled_pool.look(FULL, 2)) == 4
    assert scaled_pool.look([*FULL, load("i9", 0, 90)], 9) == []


def test_a_pool_that_has_not_reported_yet_is_waited_for() -> None:
    """The scheduler has just begun: no instance is started in the place of one that has not reported yet."""
    scaled_pool = Pool(2, 8)

    assert scaled_pool.look([]) == []
    assert scaled_pool.look(IDLE[:2], 12) == []
    assert len(Pool(2, 8).look([], 11)) == 2


def test_a_pool_without_instances_waits_for_those_on_their_way_however_many_requests_wait() -> None:
    scaler = PoolScaler("neutral", PoolBounds(1, 16), PAPER)
    waiting = Demand(requests=50, tokens=50_000)
    seen = [scaler.decide([], 1 if now > 12 else 0, float(now), waiting) for now in range(60)]

    starts = [decision for decisions in seen for decision in decisions]
    assert [type(decision) for decision in starts] == [Start]


def test_a_pool_stays_within_its_bounds() -> None:
    assert [type(decision) for decision in Pool(1, 5).look(FULL, 11)] == [Start, Start]
    assert Pool(1, 5).look(FULL, 11, starting=2) == []
    assert Pool(1, 3).look(FULL, 30) == []
    assert Pool(3, 5).look(IDLE, 30) == []


def test_a_pool_outside_its_bounds_changes_whatever_the_load() -> None:
    assert Pool(5, 8).look(IDLE, 11) == [Start("neutral", "3 of at least 5")] * 2
    assert Pool(5, 8).look(IDLE, 11, starting=2) == []
    assert Pool(1, 2).look(FULL, 11) == [Drain("i0", "3 of at most 2")]


def test_one_drains_at_a_time_the_emptiest_that_serves_no_high_priority() -> None:
    """The emptiest has the fewest blocks to move, however many requests these belong to."""
    busy = [load("i0", 800, 3), load("i1", 840, 1, high_priority=1), load("i2", 820, 2), load("i3", 840, 4)]
    scaled_pool = Pool(1, 8)
    (decision,) = scaled_pool.look([replace(one, high_priority=0) for one in busy], 11)
    assert decision == Drain("i1", decision.reason)

    (decision,) = Pool(1, 8, scale_threshold=-100.0, scale_margin=1.0).look(busy, 11)
    assert decision == Drain("i3", decision.reason)

    drains = [*busy[:3], replace(busy[3], draining=True)]
    assert scaled_pool.look([replace(one, high_priority=0) for one in drains], 30) == []


def test_several_emptiest_drain_together_within_the_bounds_and_none_while_they_do() -> None:
    rates = {"scaling": "work"}
    loads = [load(f"i{number}", 851 - number, number) for number in range(6)]
    scaled_pool = Pool(2, 8, **rates)
    decisions = scaled_pool.look(loads, 11)
    assert [one.instance_id for one in decisions if isinstance(one, Drain)] == ["i0", "i1", "i2"]

    drained = [replace(one, draining=one.instance_id < "i3") for one in loads]
    assert scaled_pool.look(drained, 30) == [Stop("i0", "drained and empty")]
    assert not any(isinstance(one, Drain) for one in scaled_pool.look(drained[1:], 30))


def test_a_burst_doubles_a_pool_at_each_look_and_what_never_starts_is_not_asked_for_again() -> None:
    queues = [load("i0", 0, 10, waiting=400, waiting_blocks=8510), load("i1", 0, 10)]
    scaled_pool = Pool(1, 16, scaling="work", **{"scaling.use": 0.85})
    assert scaled_pool.look(queues, 11) == [Start("neutral", "work for 12.00 instances at 85%, 2 there")] * 4
    assert len(scaled_pool.look(queues, 10, starting=4)) == 6
    assert len(scaled_pool.look(queues, 10, starting=10)) == 3
    assert scaled_pool.look(queues, 300, starting=13) == []


def test_a_clock_that_is_set_back_or_leaps_changes_nothing_by_itself() -> None:
    for jump in (-1e6, 1e6):
        scaled_pool = Pool(1, 8, scaling="work", forecast_s=60.0)
        steady = pool(3, 300, 10)
        assert scaled_pool.look(steady, 40) == []
        scaled_pool.now += jump
        assert scaled_pool.look(steady, 200) == []


def test_a_drain_by_an_operator_that_does_not_end_holds_nothing_up() -> None:
    """It may be meant to last, or its requests cannot move. What drains to be stopped does end, later."""
    by_hand = replace(load("i9", 800, 1), draining=True)
    scaled_pool = Pool(1, 8)
    assert scaled_pool.look([*IDLE, by_hand], 55) == []
    (decision,) = scaled_pool.look([*IDLE, by_hand], 15)
    assert isinstance(decision, Drain)

    ours = [replace(one, draining=one.instance_id == decision.instance_id) for one in IDLE]
    ours = [replace(one, running=int(one.draining)) for one in ours]
    assert scaled_pool.look([*ours, by_hand], 300) == []

    left = [one for one in IDLE if one.instance_id != decision.instance_id]
    assert len(scaled_pool.look([*left, by_hand])) == 1


def test_a_pool_has_to_be_too_large_for_a_while() -> None:
    scaled_pool = Pool(1, 8, drain_after_s=30)
    assert scaled_pool.look(IDLE, 25) == []
    assert scaled_pool.look(pool(3, 300, 10)) == []
    assert scaled_pool.look(IDLE, 25) == []
    assert len(scaled_pool.look(IDLE, 15)) == 1


def test_a_draining_instance_is_used_again_before_one_is_started() -> None:
    """The fullest first: it has most to lose."""
    drains = [load("i3", 500, 5), load("i4", 500, 9), load("i5", 851, 0)]
    drains = [replace(one, draining=True) for one in drains]
    decisions = Pool(1, 6).look([*FULL, *drains[:2]], 11)

    assert [d.instance_id for d in decisions if isinstance(d, Drain) and not d.draining] == ["i4", "i3"]
    assert [type(decision) for decision in decisions] == [Drain, Drain, Start]


def test_an_instance_that_an_operator_drains_is_left_alone() -> None:
    """It stays drained: others are started instead. It is not stopped either."""
    by_hand = replace(load("i3", 851, 0), draining=True, drained_by_operator=True)

    assert [type(decision) for decision in Pool(1, 4).look([*FULL, by_hand], 11)] == [Start]


def test_an_instance_that_goes_on_draining_is_replaced_and_asked_again_later() -> None:
    """The order does not reach it. It may not keep the pool small for ever."""
    scaled_pool = Pool(1, 6)
    deaf = replace(load("i3", 500, 5), draining=True)
    assert [type(decision) for decision in scaled_pool.look([*FULL, deaf], 11)] == [Drain, Start, Start]

    assert [type(decision) for decision in scaled_pool.look([*FULL, deaf], 10)] == [Start, Start, Start]

    later = scaled_pool.look([*FULL, deaf], 60, starting=2)
    assert Drain("i3", later[0].reason, draining=False) in later

    alone = Pool(1, 4)
    assert alone.look([deaf], 11, starting=0) == [Drain("i3", "0 of at least 1", draining=False)]
    assert alone.look([deaf], 10, starting=0) == [Start("neutral", "0 of at least 1")]


def test_what_is_drained_is_used_again_if_too_few_serve_whatever_is_being_started() -> None:
    """The start may fail, or never get its resources."""
    drained = replace(load("i3", 851, 0), draining=True)

    for starting in (0, 1, 4):
        decisions = Pool(1, 4).look([drained], 11, starting=starting)
        assert decisions == [Drain("i3", "0 of at least 1", draining=False)]


def test_what_is_about_to_be_stopped_is_used_again_when_the_others_die() -> None:
    scaled_pool = Pool(1, 4)
    busy, drained = load("i0", 300, 10), replace(load("i3", 851, 0), draining=True)
    assert scaled_pool.look([busy, drained], 3) == [Stop("i3", "drained and empty")]

    assert scaled_pool.look([drained], 11) == [Drain("i3", "0 of at least 1", draining=False)]


def test_a_pool_with_too_few_instances_grows_by_what_is_needed() -> None:
    """Not only to its lower bound."""
    assert len(Pool(4, 16).look(FULL, 11)) == len(Pool(1, 16).look(FULL, 11)) > 1


def test_a_drained_and_empty_instance_is_stopped_once_after_a_moment() -> None:
    scaled_pool = Pool(1, 8)
    busy, half = pool(2, 300, 10), replace(load("i9", 851, 0), draining=True)

    assert scaled_pool.look([*busy, replace(half, migrating_out=1)], 30) == []
    assert scaled_pool.look([*busy, half]) == []
    assert scaled_pool.look([*busy, replace(half, waiting=1)]) == []
    assert scaled_pool.look([*busy, half]) == []
    assert scaled_pool.look([*busy, half]) == [Stop("i9", "drained and empty")]
    assert scaled_pool.look([*busy, half], 30) == []


def test_an_instance_that_was_told_to_stop_is_not_used_again() -> None:
    scaled_pool = Pool(1, 8)
    empty = replace(load("i9", 851, 0), draining=True)
    assert scaled_pool.look([*pool(2, 300, 10), empty], 3) == [Stop("i9", "drained and empty")]

    assert all(isinstance(decision, Start) for decision in scaled_pool.look([*pool(2, 0, 90), empty], 20))


@given(st.integers(0, 200), st.integers(1, 4), st.integers(4, 8))
def test_under_constant_demand_the_size_settles(requests: int, least: int, most: int) -> None:
    """Requests of 20 blocks, spread evenly; what is asked for is there at the next look."""
    names = [f"i{number}" for number in range(least)]
    scaled_pool = Pool(least, most)
    sizes: list[int] = []
    for _ in range(40):
        each = requests // len(names)
        loads = [load(name, max(0, 851 - 20 * each), each) for name in names]
        for decision in scaled_pool.look(loads, 20):
            if isinstance(decision, Start):
                names.append(f"i{len(names) + len(sizes)}.{len(names)}")
            elif isinstance(decision, Drain):
                names.remove(decision.instance_id)
        sizes.append(len(names))

    assert least <= min(sizes) <= max(sizes) <= most
    assert len(set(sizes[-15:])) == 1


# ---- forecasts


def first_start(**overrides: float) -> float:
    """When a pool grows whose load does so steadily."""
    scaled_pool = Pool(1, 8, **overrides)
    for second in range(250):
        loads = pool(3, 851 - 3 * second, max(second // 6, 1))
        if any(isinstance(decision, Start) for decision in scaled_pool.look(loads)):
            return scaled_pool.now
    return math.inf


def test_with_a_forecast_a_pool_grows_before_it_has_to() -> None:
    late, early = first_start(), first_start(forecast_s=60.0)

    assert late < math.inf
    assert 40.0 <= late - early <= 80.0


def test_a_forecast_changes_nothing_for_a_load_that_stands_still() -> None:
    steady = pool(3, 400, 20)

    assert Pool(1, 8, forecast_s=60.0).look(steady, 300) == Pool(1, 8).look(steady, 300) == []
