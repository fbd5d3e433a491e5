"""The record of an engine core's steps."""

import threading
from types import SimpleNamespace
from typing import Any

from loadtests.bench.step_clock import StepClock


class CountedCore:
    """Schedules one token for each of its requests."""

    def __init__(self) -> None:
        self.num_requests = 2
        self.num_steps = 0
        self.scheduler: Any = SimpleNamespace(schedule=self._schedule)
        self.step_fn: Any = self._step

    def _step(self) -> str:
        if self.num_requests:
            self.scheduler.schedule()
        self.num_steps += 1
        return "outputs"

    def _schedule(self) -> Any:
        tokens = dict.fromkeys(range(self.num_requests), 1)
        return SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=self.num_requests)


def test_a_step_is_recorded_when_the_next_one_begins() -> None:
    core = CountedCore()
    clock = StepClock(core)

    assert core.step_fn() == "outputs"
    assert clock.take() == []
    core.num_requests = 3
    core.step_fn()
    core.step_fn()

    assert [(step.requests, step.tokens) for step in clock.take()] == [(2, 2), (3, 3)]
    assert clock.take() == []


def test_a_step_without_requests_is_not_recorded() -> None:
    core = CountedCore()
    clock = StepClock(core)
    core.num_requests = 0

    for _ in range(3):
        core.step_fn()

    assert clock.take() == []


def test_a_held_step_waits_and_the_time_until_then_belongs_to_no_step() -> None:
    core = CountedCore()
    clock = StepClock(core)
    core.step_fn()
    clock.hold()
    step = threading.Thread(target=core.step_fn)
    step.start()
    step.join(0.2)
    assert (step.is_alive(), core.num_steps) == (True, 1)
    assert len(clock.take()) == 1  # it had ended before

    clock.go()
    step.join(30)
    assert core.num_steps == 2
    core.step_fn()

    assert len(clock.take()) == 1


def test_the_time_of_an_engine_without_a_step_before_go_belongs_to_no_step() -> None:
    core = CountedCore()
    clock = StepClock(core)
    core.step_fn()
    clock.go()
    core.step_fn()
    assert clock.take() == []
    core.step_fn()
    assert len(clock.take()) == 1
