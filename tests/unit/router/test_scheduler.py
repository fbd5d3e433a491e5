"""The loop: rounds on reports, nothing decided twice, nothing remembered that matters."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.policies import policy_set
from router.projected_loads import LOST_AFTER_S
from router.request import NO_DEMAND, Demand
from router.scaling import PoolBounds
from router.scheduler import Scheduler
from tests.manual_clock import ManualClock

FULL = InstanceLoad("full", "neutral", total_blocks=851, free_blocks=0, running=2)
FREE = InstanceLoad("free", "neutral", total_blocks=851, free_blocks=700, running=1)


@dataclass
class Recorder:
    """Implements `SchedulerActions`: keeps what is asked for, as (verb, *arguments)."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)
    starting: Mapping[str, int] = field(default_factory=dict)
    waiting: Demand = NO_DEMAND

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None:
        self.asked.append(("move", source, destination.instance_id))

    def set_role(self, instance_id: str, role: str, reason: str) -> None:
        self.asked.append(("role", instance_id, role))

    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None:
        self.asked.append(("draining", instance_id, draining))

    def start(self, role: str, reason: str) -> None:
        self.asked.append(("start", role))

    def stop(self, instance_id: str, reason: str) -> None:
        self.asked.append(("stop", instance_id))


@dataclass
class Run:
    """A scheduler at a clock that stands still."""

    policy: str = "llumnix-paper"
    autoscale: Mapping[str, PoolBounds] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = ManualClock(0.0)
        self.actions = Recorder()
        self.restart()

    def restart(self) -> None:
        self.scheduler = Scheduler(
            policy_set(self.policy, **self.overrides),
            self.actions,
            autoscale=self.autoscale,
            rng=random.Random(0),
            clock=self.clock,
        )

    def round(self, *loads: InstanceLoad, after: float = 0.2) -> list[tuple[Any, ...]]:
        """What one more round has asked for."""
        self.clock.now += after
        for load in loads:
            self.scheduler.report(load)
        self.actions.asked.clear()
        self.scheduler.decide(self.clock.now)
        return list(self.actions.asked)


# ---- moves


def test_an_imbalance_is_acted_on_once_until_the_reports_show_it() -> None:
    """A source answers at its next step boundary, which may be far: it still reports the old load."""
    run = Run()

    assert run.round(FULL, FREE) == [("move", "full", "free")]
    assert run.round(FULL, FREE) == []
    assert run.round(replace(FULL, moves_decided=1, migrating_out=1), replace(FREE, migrating_in=1)) == []
    assert run.round(replace(FULL, moves_decided=1), FREE) == [("move", "full", "free")]
    assert run.round(replace(FULL, moves_decided=1), FREE) == []


def test_a_destination_takes_one_move_at_a_time_too() -> None:
    run = Run()
    run.round(FULL, FREE)

    assert run.round(FULL, FREE, replace(FULL, instance_id="other")) == []


def test_an_order_without_confirmation_is_lost_after_a_while() -> None:
    run = Run()
    run.round(FULL, FREE)

    assert run.round(FULL, FREE, after=LOST_AFTER_S - 0.1) == []
    assert run.round(FULL, FREE, after=0.2) == [("move", "full", "free")]


def test_counting_starts_from_what_the_instance_has_decided() -> None:
    """This scheduler is not its first one."""
    run = Run()
    full = replace(FULL, moves_decided=7)

    assert run.round(full, FREE) == [("move", "full", "free")]
    assert run.round(full, FREE) == []
    assert run.round(replace(full, moves_decided=8), FREE) == [("move", "full", "free")]


def test_several_moves_are_under_way_at_a_time_up_to_the_bound() -> None:
    run = Run("llumnix")
    full = replace(FULL, running=10, waiting=1, head_of_line_blocks=800, waiting_blocks=800)

    for _ in range(run.scheduler.policies.max_moves):
        assert run.round(full, FREE) == [("move", "full", "free")]
    assert run.round(full, FREE) == []
    assert run.round(replace(full, moves_decided=4, migrating_out=3), FREE) == [("move", "full", "free")]


def test_without_rescheduling_nothing_moves() -> None:
    assert Run("infaas++").round(FULL, FREE) == []


def test_headroom_counts_where_the_policy_set_says_so() -> None:
    busy = replace(FREE, instance_id="busy", high_priority=1, running=3)

    assert Run().round(busy, FREE) == [("move", "busy", "free")]
    assert Run(overrides={"headroom": 0}).round(busy, FREE) == []


# ---- instances come and go


def test_an_instance_that_stops_reporting_takes_no_part() -> None:
    run = Run()
    run.scheduler.report(FREE)

    assert run.round(FULL, after=3.1) == []
    assert run.round(FULL, FREE) == [("move", "full", "free")]


def test_a_removed_instance_takes_no_part_and_starts_from_its_own_report_when_it_comes_back() -> None:
    run = Run()
    run.round(FULL, FREE)
    run.scheduler.remove("full")
    run.scheduler.remove("nobody")

    assert run.round() == []
    assert run.round(FULL) == [("move", "full", "free")]


def test_a_scheduler_that_starts_again_goes_on_with_the_next_reports() -> None:
    run = Run()
    run.round(FULL, FREE)
    run.restart()

    assert run.round() == []
    assert run.round(FULL, FREE) == [("move", "full", "free")]


# ---- scaling and roles reach the actions


def test_a_pool_grows_and_instances_that_are_starting_count() -> None:
    run = Run(autoscale={"neutral": PoolBounds(1, 4)})
    crowded = replace(FULL, running=80)

    assert run.round(crowded) == []
    assert run.round(crowded, after=10) == [("start", "neutral")]
    run.actions.starting = {"neutral": 1}
    assert run.round(crowded, after=10) == []


def test_requests_that_wait_for_room_count_for_the_pool() -> None:
    run = Run(autoscale={"neutral": PoolBounds(1, 4)})
    half = InstanceLoad("i0", "neutral", total_blocks=851, free_blocks=400, running=20)
    run.round(half)
    assert run.round(half, after=10) == []

    run.actions.waiting = Demand(requests=10, tokens=6400)

    assert run.round(half, after=10) == [("start", "neutral")]


def test_prompts_in_line_count_for_the_prefill_pool_and_not_for_the_decode_pool() -> None:
    """With fair shares they wait there, and the instances' own queues are short."""
    run = Run(autoscale={"prefill": PoolBounds(1, 4), "decode": PoolBounds(1, 4)})
    pools = [
        InstanceLoad("p0", "prefill", total_blocks=851, free_blocks=851, busy=0.6, prompt_token_s=0.001),
        InstanceLoad("d0", "decode", total_blocks=851, free_blocks=400, running=20),
    ]
    run.round(*pools)
    assert run.round(*pools, after=10) == []

    run.actions.waiting = Demand(requests=10, tokens=6400)

    assert run.round(*pools, after=10) == [("start", "prefill")]


def test_requests_that_a_full_decode_pool_leaves_on_prefill_instances_count_for_it() -> None:
    """Its own load stands still: nothing more fits."""
    run = Run(autoscale={"decode": PoolBounds(1, 4)})
    full = InstanceLoad("d0", "decode", total_blocks=851, free_blocks=400, running=20)
    empty, holding = (
        InstanceLoad(
            "p0", "prefill", total_blocks=851, free_blocks=851 - used, running=used // 40, draining=True
        )
        for used in (0, 400)
    )
    run.round(full, empty)
    assert run.round(full, empty, after=10) == []

    assert run.round(full, holding, after=10) == [("start", "decode")]


def test_a_pool_shrinks_by_draining_and_stops_what_is_empty() -> None:
    run = Run(autoscale={"neutral": PoolBounds(1, 4)})
    idle = InstanceLoad("idle", "neutral", total_blocks=851, free_blocks=851)

    assert run.round(idle, FREE) == []
    assert run.round(idle, FREE, after=10) == [("draining", "idle", True)]
    drained = replace(idle, draining=True)
    assert run.round(drained, FREE) == []
    assert run.round(drained, FREE, after=1.0) == [("stop", "idle")]
    assert run.round(drained, FREE) == []


def test_an_idle_instance_changes_its_role() -> None:
    run = Run("llumnix", overrides={"roles": 1})
    behind = InstanceLoad(
        "p0", "prefill", total_blocks=851, free_blocks=400, running=8, waiting=20, waiting_tokens=50_000
    )
    idle = [InstanceLoad(f"d{number}", "decode", total_blocks=851, free_blocks=851) for number in range(2)]

    assert run.round(behind, *idle) == []
    assert run.round(behind, *idle, after=10) == [("role", "d0", "prefill")]


# ---- the loop


async def looped(body: Callable[[Scheduler, Recorder], Any], **overrides: Any) -> Recorder:
    actions = Recorder()
    scheduler = Scheduler(policy_set("llumnix-paper", **overrides), actions)
    task = asyncio.create_task(scheduler.run())
    await body(scheduler, actions)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return actions


async def test_a_report_is_acted_on_at_once() -> None:
    async def body(scheduler: Scheduler, actions: Recorder) -> None:
        await asyncio.sleep(0)
        scheduler.report(FREE)
        scheduler.report(FULL)
        await asyncio.sleep(0.01)

    assert (await looped(body, rescheduling_interval_s=10.0)).asked == [("move", "full", "free")]


async def test_rounds_are_apart_and_the_last_report_is_not_missed() -> None:
    async def body(scheduler: Scheduler, actions: Recorder) -> None:
        await asyncio.sleep(0)
        scheduler.report(FREE)
        await asyncio.sleep(0.01)
        scheduler.report(FULL)
        await asyncio.sleep(0.02)
        assert actions.asked == []
        await asyncio.sleep(0.1)

    assert (await looped(body, rescheduling_interval_s=0.1)).asked == [("move", "full", "free")]


@pytest.mark.parametrize("policy", ["llumnix-paper", "llumnix"])
def test_a_round_over_1024_instances_takes_milliseconds(policy: str) -> None:
    rng = random.Random(0)
    loads = [
        InstanceLoad(
            f"i{number}",
            "neutral",
            total_blocks=851,
            free_blocks=rng.randint(0, 851),
            running=rng.randint(1, 40),
        )
        for number in range(1024)
    ]
    took = []
    for _ in range(3):
        run = Run(policy, autoscale={"neutral": PoolBounds(1, 2000)}, overrides={"migration_threshold": 20})
        for load in loads:
            run.scheduler.report(load)
        start = time.perf_counter()
        asked = run.round()
        took.append(time.perf_counter() - start)
        assert len(asked) > 100

    assert min(took) < 0.2  # some milliseconds where nothing else runs


def test_without_de_fragmentation_a_queue_is_no_reason_to_move() -> None:
    queued = InstanceLoad(
        "full",
        "neutral",
        total_blocks=851,
        free_blocks=100,
        running=5,
        waiting=1,
        head_of_line_blocks=300,
        waiting_blocks=300,
    )
    free = InstanceLoad("free", "neutral", total_blocks=851, free_blocks=700, running=5)

    assert Run("llumnix").round(queued, free)
    assert Run("llumnix", overrides={"defragment": 0}).round(queued, free) == []
