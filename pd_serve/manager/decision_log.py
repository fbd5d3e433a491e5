"""The latest decisions about instances, for the log and `GET /cluster`."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable

from pd_serve.comm.cluster_state import PastDecision, ScaledCount

logger = logging.getLogger(__name__)

NUM_DECISIONS = 20


class DecisionLog:
    """Logs decisions, keeps the last `NUM_DECISIONS`, and counts started and stopped instances.

    Args:
        on_change: Called after every entry.

    Attributes:
        observer: Called with every entry; for measurements.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self.observer: Callable[[str], None] = lambda what: None
        self._loop = asyncio.get_running_loop()
        self._decisions: deque[tuple[float, str]] = deque(maxlen=NUM_DECISIONS)
        self._scaled: Counter[tuple[str, str]] = Counter()

    def add(self, what: str) -> None:
        logger.info("%s", what)
        self.observer(what)
        self._decisions.append((self._loop.time(), what))
        self._on_change()

    def count(self, action: str, role: str) -> None:
        """Counts an instance that was started, stopped or lost ("start", "stop", "lost") while serving."""
        self._scaled[action, role] += 1

    def latest(self) -> list[PastDecision]:
        """Newest first."""
        now = self._loop.time()
        return [PastDecision(round(now - at, 1), what) for at, what in reversed(self._decisions)]

    def scaled(self) -> list[ScaledCount]:
        return [ScaledCount(action, role, number) for (action, role), number in self._scaled.items()]
