"""An event loop with a virtual clock, which does not wait between events."""

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable
from typing import Any


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that advances its clock to the next timer when no callback is ready.

    It has no sockets, threads or signals. Timers with the same time fire in the order in which they were set,
    so runs are deterministic.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, asyncio.Handle]] = []
        self._serial = itertools.count()

    def time(self) -> float:
        return self._now_s

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._serial), timer))
        return timer

    # ---- called by asyncio.BaseEventLoop

    def _run_once(self) -> None:
        """Runs the ready callbacks, or those of the next timers if none is ready."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise RuntimeError("deadlock: all tasks wait and no timer is set")
            if timers[0][0] > self._now_s:
                self._now_s = timers[0][0]
            while timers and timers[0][0] <= self._now_s:
                ready.append(heapq.heappop(timers)[2])
        run, next_ready = self._run, ready.popleft
        for _ in range(len(ready)):
            run(next_ready())

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle._cancelled:
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing to do: cancelled timers are skipped when their time comes."""
