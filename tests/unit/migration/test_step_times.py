"""Measured durations of steps."""

import random

import pytest

from migration.step_times import StepTimes


def test_nothing_is_known_before_a_step() -> None:
    times = StepTimes()
    assert (times.decode_s, times.prompt_token_s) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_mixed_steps_are_told_apart(seed: int) -> None:
    rng = random.Random(seed)
    times = StepTimes()
    for _ in range(400):
        tokens = rng.choice([0, 0, 0, rng.randrange(16, 2048)])
        times.add((0.02 + tokens * 1e-4) * rng.uniform(0.9, 1.1), tokens)
    assert times.decode_s == pytest.approx(0.02, rel=0.1)
    assert times.prompt_token_s == pytest.approx(1e-4, rel=0.15)


def test_an_engine_without_decode_steps_is_measured_by_whole_steps() -> None:
    times = StepTimes()
    for _ in range(50):
        times.add(0.2, 2000)
    assert times.prompt_token_s == pytest.approx(1e-4)


def test_a_first_slow_step_is_forgotten() -> None:
    times = StepTimes()
    times.add(60.0, 1000)
    times.add(30.0, 0)
    for _ in range(200):
        times.add(0.02, 0)
        times.add(0.12, 1000)
    assert times.decode_s == pytest.approx(0.02, rel=0.1)
    assert times.prompt_token_s == pytest.approx(1e-4, rel=0.1)


def test_a_step_that_is_faster_than_a_decode_step_gives_no_negative_time() -> None:
    times = StepTimes()
    times.add(0.5, 0)
    times.add(0.1, 100)
    assert times.prompt_token_s > 0


def test_the_time_per_token_includes_prompts_between_decodes() -> None:
    times = StepTimes()
    for _ in range(200):
        times.add(0.02, 0)
        times.add(0.01, 0)
        times.add(0.06, 500, decodes=False)
    assert times.token_s == pytest.approx(0.045, rel=0.05)
    assert times.least_step_s == pytest.approx(0.01, rel=0.01)
    assert times.busy_s == pytest.approx(200 * 0.09)


def test_a_single_short_step_is_not_the_shortest() -> None:
    times = StepTimes()
    for _ in range(10):
        times.add(0.02, 0)
    times.add(0.0, 0)
    assert times.least_step_s == pytest.approx(0.018)
