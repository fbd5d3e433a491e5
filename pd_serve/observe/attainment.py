"""The share of requests that meet their targets at present, of one API server."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import Timeline

#: Time over which it is counted, in seconds.
WINDOW_S = 60


class TargetCounts(NamedTuple):
    """Requests with targets that have ended, and those of them that have met all of theirs."""

    requests: int = 0
    met: int = 0


@dataclass(slots=True)
class _Second:
    number: int
    requests: int = 0
    met: int = 0


class Attainment(Observer):
    """Counts by seconds, so that its size is bounded.

    Args:
        clock: In seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[_Second] = deque(maxlen=WINDOW_S)

    def ended(self, request: Timeline) -> None:
        if (met := request.met) is None:
            return
        now = int(self._clock())
        if not self._seconds or self._seconds[-1].number != now:
            self._seconds.append(_Second(now))
        self._seconds[-1].requests += 1
        self._seconds[-1].met += met.all

    @property
    def counts(self) -> TargetCounts:
        """Of the last `WINDOW_S` seconds."""
        now = int(self._clock())
        # A second that is to come was counted before the clock was set back.
        recent = [second for second in self._seconds if now - WINDOW_S < second.number <= now]
        return TargetCounts(sum(s.requests for s in recent), sum(s.met for s in recent))
