"""An event loop with a virtual clock, which does not wait between events."""

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable
from typing import Any


class VirtualHandle(asyncio.TimerHandle):
    """A callback without the costs of one in real time: a copy of the context, and traces for debugging."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = context
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None

    def _run(self) -> None:
        try:
            if self._context is None:
                self._callback(*self._args)
            else:
                self._context.run(self._callback, *self._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            text = f"Exception in callback {self._callback!r}"
            self._loop.call_exception_handler({"message": text, "exception": error, "handle": self})


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that advances its clock to the next timer when no callback is ready.

    It has no sockets, threads or signals. Timers with the same time fire in the order in which they were set,
    so runs are deterministic. Only callbacks that are given a context run in one, as those of tasks are.
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
        timer = VirtualHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._serial), timer))
        return timer

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = VirtualHandle(0.0, callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    # ---- called by asyncio.BaseEventLoop

    def _run_once(self) -> None:
        """Runs callbacks until the loop stops: the ready ones, or those of the next timers if none is."""
        ready, run = self._ready, self._run  # type: ignore[attr-defined]
        while not self._stopping:  # type: ignore[attr-defined]
            if not ready:
                timers = self._timers
                while timers and timers[0][2]._cancelled:
                    heapq.heappop(timers)
                if not timers:
                    raise RuntimeError("deadlock: all tasks wait and no timer is set")
                if timers[0][0] > self._now_s:
                    self._now_s = timers[0][0]
                while timers and timers[0][0] <= self._now_s:
                    ready.append(heapq.heappop(timers)[2])
            for _ in range(len(ready)):
                run(ready.popleft())

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle._cancelled:
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing to do: cancelled timers are skipped when their time comes."""
