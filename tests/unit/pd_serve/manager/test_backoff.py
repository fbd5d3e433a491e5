"""Backoff between failed starts."""

from pd_serve.comm.timing import MAX_DEATH_PAUSE_S, MAX_START_BACKOFF_S, START_BACKOFF_S
from pd_serve.manager.backoff import Backoff


def pause_after_failure(backoff: Backoff, now: float) -> float:
    backoff.failed(now)
    return backoff.retry_at - now


def test_the_backoff_doubles_up_to_its_maximum_and_is_reset() -> None:
    backoff = Backoff()
    pauses = [pause_after_failure(backoff, 1000.0 * number) for number in range(8)]
    assert pauses[:3] == [START_BACKOFF_S, 2 * START_BACKOFF_S, 4 * START_BACKOFF_S]
    assert pauses[-1] == MAX_START_BACKOFF_S

    backoff.reset()
    assert pause_after_failure(backoff, 9000.0) == START_BACKOFF_S


def test_early_deaths_have_a_lower_maximum_and_make_failed_starts_wait_no_longer() -> None:
    backoff = Backoff()
    pauses = []
    for number in range(8):
        backoff.died_early(1000.0 * number)
        pauses.append(backoff.retry_at - 1000.0 * number)
    assert pauses == [START_BACKOFF_S] + [MAX_DEATH_PAUSE_S] * 7
    assert [pause_after_failure(backoff, 9000.0 + 1000 * i) for i in range(2)] == [10.0, 20.0]


def test_an_early_death_does_not_shorten_the_pause_after_failed_starts() -> None:
    backoff = Backoff()
    pauses = [pause_after_failure(backoff, 1000.0 * number) for number in range(8)]
    backoff.died_early(7000.0 + 60.0)
    assert backoff.retry_at == 7000.0 + pauses[-1] == 7000.0 + MAX_START_BACKOFF_S


def test_failures_at_the_same_time_count_as_one() -> None:
    """A process of 16 instances has died."""
    backoff = Backoff()
    for instance in range(16):
        backoff.failed(1000.0 + instance / 1000)

    assert backoff.retry_at == 1000.0 + START_BACKOFF_S
    assert pause_after_failure(backoff, 1010.0) == 2 * START_BACKOFF_S
