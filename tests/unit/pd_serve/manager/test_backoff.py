"""Backoff between failed starts."""

from pd_serve.comm.timing import MAX_START_BACKOFF_S, START_BACKOFF_S
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


def test_failures_at_the_same_time_count_as_one() -> None:
    """A process of 16 instances has died."""
    backoff = Backoff()
    for instance in range(16):
        backoff.failed(1000.0 + instance / 1000)

    assert backoff.retry_at == 1000.0 + START_BACKOFF_S
    assert pause_after_failure(backoff, 1010.0) == 2 * START_BACKOFF_S
