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
    _repr = _source_traceback = None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._context = context

    def cancel(self) -> None:
        self._callback = None  # type: ignore[assignment]
        self._args = ()

    def cancelled(self) -> bool:
        return self._callback is None

    @property
    def _cancelled(self) -> bool:  # type: ignore[override]
        return self._callback is None


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that advances its clock to the next timer when no callback is ready.

    It has no sockets, threads or signals. Timers with the same time fire in the order in which they were set,
    so runs are deterministic. Only callbacks that are given a context run in one, as those of tasks are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, VirtualHandle]] = []
        self._serial = itertools.count()
        self._held: dict[str, list[asyncio.Handle] | None] = {}  # see `ProcessLoop`

    def time(self) -> float:
        return self._now_s

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = VirtualHandle(when, callback, args, context)
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
        handle = VirtualHandle(0.0, callback, args, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    # ---- called by asyncio.BaseEventLoop

    def _run_once(self) -> None:
        """Runs callbacks until the loop stops: the ready ones, or those of the next timers if none is."""
        ready, timers, held = self._ready, self._timers, self._held  # type: ignore[attr-defined]
        while not self._stopping:  # type: ignore[attr-defined]
            if not ready:
                while timers and timers[0][2]._callback is None:
                    heapq.heappop(timers)
                if not timers:
                    raise RuntimeError("deadlock: all tasks wait and no timer is set")
                self._now_s = now_s = max(self._now_s, timers[0][0])
                while timers and timers[0][0] <= now_s:
                    ready.append(heapq.heappop(timers)[2])
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._callback is None or (held and self._is_held(handle)):
                    continue
                try:
                    if handle._context is None:
                        handle._callback(*handle._args)
                    else:
                        handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    text = f"Exception in callback {handle._callback!r}"
                    self.call_exception_handler({"message": text, "exception": error, "handle": handle})

    def _is_held(self, handle: asyncio.Handle) -> bool:
        """Keeps a callback back if it must not run now."""
        return False
