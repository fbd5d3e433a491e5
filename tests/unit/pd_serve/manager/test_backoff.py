"""Backoff between failed starts."""

from pd_serve.comm.timing import MAX_START_BACKOFF_S, START_BACKOFF_S
from pd_serve.manager.backoff import Backoff


def test_the_backoff_doubles_up_to_its_maximum_and_is_reset() -> None:
    backoff = Backoff()
    pauses = []
    for _ in range(8):
        backoff.failed(1000.0)
        pauses.append(backoff.retry_at - 1000.0)
    assert pauses[:3] == [START_BACKOFF_S, 2 * START_BACKOFF_S, 4 * START_BACKOFF_S]
    assert pauses[-1] == MAX_START_BACKOFF_S

    backoff.reset()
    backoff.failed(2000.0)
    assert backoff.retry_at - 2000.0 == START_BACKOFF_S
