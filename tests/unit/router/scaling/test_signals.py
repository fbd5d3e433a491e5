"""Scaling by average freeness, by prompt tokens that wait, by time in steps, and by work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.freeness import pooled_freeness
from router.load import InstanceLoad
from router.policies import policy_set
from router.request import NO_DEMAND, Demand
from router.scaling import SizeChange
from router.scaling.signals import (
    MAX_CHANGE,
    BacklogSignal,
    BusySignal,
    FreenessSignal,
    WorkSignal,
    to_hand_off,
)
from router.settings import PolicySet
from tests.unit.router.made_loads import clusters, neutral, prefill, scaled

PAPER = policy_set("llumnix-paper")


def load(name: str, free: int, running: int, **other: int) -> InstanceLoad:
    return neutral(name, free, running, total=851, **other)


def pool(count: int, free: int, running: int) -> list[InstanceLoad]:
    return [load(f"i{number}", free, running) for number in range(count)]


def look(loads: list[InstanceLoad], starting: int, policies: PolicySet = PAPER) -> SizeChange:
    return FreenessSignal().look(loads, starting, policies, NO_DEMAND)


def test_average_freeness_below_t_asks_for_more_until_it_is_not() -> None:
    """4 x 80 free for 4 x 20 requests are 4 each; another 851 make it 14."""
    crowded = pool(4, 80, 20)

    assert look(crowded, 0).instances == 1
    assert look(pool(4, 0, 60), 0).instances == 3
    assert look(pool(16, 0, 80), 0).instances == MAX_CHANGE
    assert look(pool(4, 220, 20), 0).instances == 0


def test_starting_instances_count_as_idle() -> None:
    assert look(pool(4, 80, 20), 1).instances == 0
    assert look(pool(4, 0, 60), 1).instances == 2


def test_average_freeness_without_one_above_t_and_margin_asks_for_one_less() -> None:
    """(4 x 600 - 851) / 20 = 77 > 60; with 26 requests it is 59.6."""
    assert look(pool(4, 600, 5), 0).instances == -1
    assert look([*pool(3, 600, 5), load("i3", 600, 11)], 0).instances == 0
    assert look(pool(4, 600, 5), 1).instances == 0


def test_an_idle_instance_does_not_hide_that_the_others_are_full() -> None:
    """The mean of the instances' own freeness would be above 170."""
    assert look([*pool(4, 0, 40), load("i4", 851, 0)], 0).instances == 1


def test_the_whole_queue_counts() -> None:
    assert look(pool(1, 200, 10), 0).instances == 0
    queue = load("i0", 200, 10, waiting=5, head_of_line_blocks=50, waiting_blocks=250)
    assert look([queue], 0).instances == 1


def test_headroom_is_no_use_of_memory() -> None:
    """One request of high priority on a lone instance that is nine tenths free does not ask for another."""
    assert look([load("i0", 766, 2, high_priority=1)], 0).instances == 0


def test_the_reason_is_one_line_with_the_numbers() -> None:
    assert look(pool(4, 80, 20), 0).reason == "average freeness 4.0 < 10"
    assert look(pool(4, 600, 5), 0).reason == "average freeness without it 77.5 > 60"


@given(clusters("neutral", least=1), st.integers(0, 3))
def test_growing_and_shrinking_are_far_apart(cluster: list[InstanceLoad], starting: int) -> None:
    """Right after a pool has grown by what it asked for, it does not ask to shrink, and the reverse."""
    serving = [replace(one, draining=False, total_blocks=1000) for one in cluster]
    needed = look(serving, starting)
    idle = [
        InstanceLoad(f"new {n}", "neutral", total_blocks=1000, free_blocks=1000)
        for n in range(starting + max(needed.instances, 0))
    ]
    if needed.instances > 0:
        assert pooled_freeness(serving, 1000 * starting) < PAPER.scale_threshold
        then = look([*serving, *idle], 0)
        assert needed.instances == MAX_CHANGE or then.instances <= 0
    if needed.instances < 0:
        assert pooled_freeness(serving, -1000) > PAPER.scale_threshold + PAPER.scale_margin


@given(clusters("neutral", least=1), st.integers(2, 5))
def test_freeness_scales_with_its_thresholds(cluster: list[InstanceLoad], factor: int) -> None:
    serving = [replace(one, draining=False) for one in cluster]
    larger = policy_set("llumnix-paper", scale_threshold=10.0 * factor, scale_margin=50.0 * factor)

    assert look([scaled(one, factor) for one in serving], 0, larger).instances == look(serving, 0).instances


@pytest.mark.parametrize(
    ("tokens", "starting", "change"),
    [(9000, 0, 1), (8000, 0, 0), (9000, 1, 0), (600, 0, 0), (400, 0, -1), (400, 1, 0)],
)
def test_a_prefill_pool_goes_by_the_prompt_tokens_that_wait(tokens: int, starting: int, change: int) -> None:
    """Of two instances: as many tokens each."""
    pool = [prefill(f"p{n}", tokens) for n in range(2)]

    assert BacklogSignal().look(pool, starting, PAPER, NO_DEMAND).instances == change


@pytest.mark.parametrize(
    ("busy", "starting", "change"),
    [(0.9, 0, 1), (0.7, 0, 0), (0.9, 1, 0), (0.35, 0, -1), (0.35, 1, 0), (1.0, 0, 1)],
)
def test_a_prefill_pool_goes_by_the_share_of_time_in_steps(busy: float, starting: int, change: int) -> None:
    """Of three instances, whose queues are empty."""
    pool = [prefill(f"p{n}", busy=busy, prompt_token_s=1e-4) for n in range(3)]

    assert BusySignal().look(pool, starting, PAPER, NO_DEMAND).instances == change


def test_prompts_that_wait_need_instances_by_the_time_that_they_take() -> None:
    pool = [prefill(f"p{n}", 40_000, busy=1.0, prompt_token_s=1e-3) for n in range(2)]  # 80 s of work

    assert BusySignal().look(pool, 0, PAPER, NO_DEMAND).instances == MAX_CHANGE


def test_a_constant_load_does_not_make_a_prefill_pool_swing() -> None:
    """At every load some size neither grows nor shrinks."""
    for work in (0.3, 1.0, 2.0, 3.3, 5.0, 7.9):
        stable = []
        for count in range(1, 16):
            pool = [prefill(f"p{n}", busy=min(work / count, 1.0), prompt_token_s=1e-4) for n in range(count)]
            if BusySignal().look(pool, 0, PAPER, NO_DEMAND).instances == 0:
                stable.append(count)
        assert stable or work < 0.5


# ---- work


def work(loads: list[InstanceLoad], starting: int = 0, waiting: Demand = NO_DEMAND) -> int:
    return WorkSignal(use=0.8, margin=0.2).look(loads, starting, PAPER, waiting).instances


def busy(count: int, share: float, waiting_tokens: int = 0) -> list[InstanceLoad]:
    return [prefill(f"p{n}", waiting_tokens, busy=share, prompt_token_s=1e-3) for n in range(count)]


@pytest.mark.parametrize(
    ("used", "count", "change"),
    [
        (0.7, 4, 0),
        (0.79, 4, 0),
        (0.9, 4, 1),
        (1.0, 16, 4),
        (0.5, 4, 0),
        (0.4, 4, -1),
        (0.1, 16, -8),
        (0.0, 4, -2),
    ],
)
def test_a_pool_gets_as_many_instances_as_its_work_takes(used: float, count: int, change: int) -> None:
    """By blocks in decode and neutral pools, by time in steps in prefill pools."""
    assert work(pool(count, math.ceil(851 * (1 - used)), 20)) == change
    assert work(busy(count, used)) == change


def test_work_beyond_the_target_of_the_time_per_token_needs_more_instances() -> None:
    """Half of the memory is in use, and the target leaves six tenths of it."""
    loads = [replace(one, slow_blocks=340) for one in pool(4, 425, 20)]

    assert work(pool(4, 425, 20)) == 0
    assert work(loads) == 1


def test_what_waits_is_work_at_once() -> None:
    assert work(busy(8, 0.8, 10_000)) == 8  # 6.4, and 8 for 80 s of prompts within 10 s
    queues = [replace(one, waiting=10, waiting_blocks=851) for one in pool(4, 170, 20)]
    assert work(queues) == 4
    assert work(pool(4, 425, 0), 0, Demand(100, 100 * 16 * 20)) == 2


def test_what_prefill_instances_run_is_work_of_the_decode_pool() -> None:
    others = [prefill("p0", free=40, running=3), prefill("p1", free=100), *pool(2, 0, 20)]
    held = to_hand_off(others)

    assert held == Demand(requests=3, blocks=60)
    assert to_hand_off([]) == NO_DEMAND
    assert work(pool(4, 213, 20)) == 0
    assert work(pool(4, 213, 20), 0, Demand(20, blocks=851)) == 1
    assert look(pool(4, 220, 20), 0).instances == 0
    assert FreenessSignal().look(pool(4, 220, 20), 0, PAPER, Demand(20, blocks=851)).instances == 2


def test_a_look_doubles_a_small_pool_or_more_and_a_large_one_at_most() -> None:
    """A time per token of 20 times the target, measured once, is not believed at once."""
    assert work(busy(2, 1.0, 100_000)) == MAX_CHANGE
    assert work(busy(6, 1.0, 100_000)) == 6
    assert work(busy(6, 1.0, 100_000), starting=6) == 12
    assert work([replace(one, slow_blocks=830) for one in pool(6, 0, 20)]) == 6


def test_starting_instances_count_and_nothing_goes_before_they_are_there() -> None:
    assert work(pool(4, 85, 20), starting=1) == 0
    assert work(pool(4, 851, 0), starting=1) == 0


@pytest.mark.parametrize("role", ["prefill", "decode", "neutral"])
def test_nothing_measured_and_nothing_reported_asks_for_nothing(role: str) -> None:
    """No step yet, no blocks yet, or a target that leaves none: no division by zero."""
    for fields in ({}, {"total_blocks": 10, "slow_blocks": 10}, {"waiting_tokens": 10**6}):
        one = InstanceLoad("i0", role, **fields)
        assert WorkSignal().look([one], 0, PAPER, Demand(3, 3000)).instances >= 0
        assert WorkSignal().look([one], 0, PAPER, NO_DEMAND).instances >= 0


@given(clusters(least=1), st.integers(0, 3), st.floats(0.5, 1.0), st.floats(0.0, 0.4))
def test_a_pool_that_changed_by_its_work_does_not_change_back(
    cluster: list[InstanceLoad], starting: int, use: float, margin: float
) -> None:
    """The same work on as many instances as were asked for is the right size."""
    share = sum(one.running for one in cluster) / (16 * len(cluster))
    signal = WorkSignal(use, margin)
    count = len(cluster) + starting
    change = signal.look(busy(len(cluster), share), starting, PAPER, NO_DEMAND).instances
    then = count + change
    spread = min(share * len(cluster) / then, 1.0)

    assert then >= 1
    if change < 0:
        assert signal.look(busy(then, spread), 0, PAPER, NO_DEMAND).instances <= 0
    elif change > 0:
        assert signal.look(busy(then, spread), 1, PAPER, NO_DEMAND).instances <= 0
