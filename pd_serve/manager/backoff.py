"""Exponential backoff between failed starts."""

from pd_serve.comm.timing import DEATH_CHAIN_S, MAX_START_BACKOFF_S, START_BACKOFF_S


class Backoff:
    """Backoff of one role: failures in one pool do not delay starts in another.

    Attributes:
        retry_at: Earliest time of the next start.
        failed_at: Time of the last failure; None if there is none.
    """

    def __init__(self) -> None:
        self.retry_at = 0.0
        self.failed_at: float | None = None
        self._pause_s = START_BACKOFF_S

    def failed(self, now: float) -> None:
        """Counts a failure. Those within `DEATH_CHAIN_S` count as one: a process may have had all of them."""
        last, self.failed_at = self.failed_at, now
        if last is None or now - last > DEATH_CHAIN_S:
            self.retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_START_BACKOFF_S)

    def reset(self) -> None:
        """Forgets the failures: starts succeed again."""
        self.failed_at, self._pause_s = None, START_BACKOFF_S
