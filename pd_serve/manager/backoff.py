"""Exponential backoff between failed starts."""

from pd_serve.comm.timing import DEATH_CHAIN_S, MAX_DEATH_PAUSE_S, MAX_START_BACKOFF_S, START_BACKOFF_S


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
        """Counts a failed start. Failures within `DEATH_CHAIN_S` count as one: they may be of one process."""
        self._failed(now, MAX_START_BACKOFF_S)

    def died_early(self, now: float) -> None:
        """Counts an early death, after which the pause has another maximum: the start has succeeded."""
        self._failed(now, MAX_DEATH_PAUSE_S)

    def _failed(self, now: float, most_s: float) -> None:
        last, self.failed_at = self.failed_at, now
        if last is None or now - last > DEATH_CHAIN_S:
            self.retry_at = max(self.retry_at, now + min(self._pause_s, most_s))
            self._pause_s = max(self._pause_s, min(2 * self._pause_s, most_s))

    def reset(self) -> None:
        """Forgets the failures: starts succeed again."""
        self.failed_at, self._pause_s = None, START_BACKOFF_S
