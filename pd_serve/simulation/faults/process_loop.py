"""Several simulated processes on one event loop: each can be killed, suspended, or get a clock that jumps.

Every callback of a process runs in a context that names the process, and so do the tasks and timers that it
starts. The loop asks the context of a callback before it runs it.
"""

import asyncio
import contextlib
import contextvars
import gc
import heapq
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

from pd_serve.simulation.virtual_time import VirtualHandle, VirtualLoop

#: Id of the process to which the running callback belongs; "" outside of all processes.
PROCESS: contextvars.ContextVar[str] = contextvars.ContextVar("process", default="")

_OUTSIDE = contextvars.Context()

#: Unix time at the beginning of a run.
EPOCH_S = 1.7e9

#: The order in which a process handles what has become due while it was suspended.
ThawOrder = Literal["as it came", "timers first", "messages first"]


class MessageHandle(VirtualHandle):
    """The arrival of a message; `ThawOrder` treats it apart from timers."""

    __slots__ = ()


class ProcessLoop(VirtualLoop):
    """A virtual event loop whose callbacks belong to processes.

    Attributes:
        now: The time of the simulation, which the clock jumps of a process do not change.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held = {}  # of suspended processes; None: dead
        self._offsets: dict[str, float] = {}
        self._wall_offset_s = 0.0
        self._wall_offsets: dict[str, float] = {}
        self._kept: list[asyncio.Task[Any]] = []
        self._numbers: dict[str, int] = {}

    @property
    def now(self) -> float:
        return self._now_s

    def time(self) -> float:
        """The clock of the running process."""
        if self._offsets:
            return self._now_s + self._offsets.get(PROCESS.get(), 0.0)
        return self._now_s

    def wall_s(self) -> float:
        """The wall clock of the running process, as Unix time."""
        return EPOCH_S + self._now_s + self._wall_offset_s + self._wall_offsets.get(PROCESS.get(), 0.0)

    def jump_wall(self, seconds: float) -> None:
        """Sets the wall clocks of all processes, and of later ones, forward or back."""
        self._wall_offset_s += seconds

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        if context is None:
            context = contextvars.copy_context()
        if self._offsets:
            when -= self._offsets.get(context.get(PROCESS, ""), 0.0)
        timer = VirtualHandle(when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._serial), timer))
        return timer

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        context = contextvars.copy_context() if context is None else context
        handle = VirtualHandle(0.0, callback, args, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def deliver_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context
    ) -> None:
        """Has the process of a context handle a message at a time of the simulation."""
        handle = MessageHandle(when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._serial), handle))

    def outside(self, callback: Callable[..., object], *args: Any) -> None:
        """Calls a function next, as a part of no process."""
        handle = VirtualHandle(0.0, callback, args, _OUTSIDE)
        self._ready.appendleft(handle)  # type: ignore[attr-defined]

    def outside_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Calls a function at a time of the simulation, as a part of no process: it happens if one dies."""
        super().call_at(when, callback, *args, context=_OUTSIDE)

    def spawn(self, name: str) -> "SimulatedProcess":
        """A new process. Earlier processes of the same name remain others."""
        number = self._numbers[name] = self._numbers.get(name, -1) + 1
        return SimulatedProcess(self, name, f"{name}#{number}")

    def drop(self) -> None:
        """Drops all processes as they are at the end of a simulation, without a cleanup of their tasks."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        self.set_exception_handler(lambda loop, context: None)
        _silence([*self._kept, *asyncio.all_tasks(self)])
        self._kept.clear()
        self._held.clear()
        self._timers.clear()
        self._ready.clear()  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that have not begun
            gc.collect()
        sys.unraisablehook = hook
        self.close()

    # ---- for SimulatedProcess

    def is_alive(self, process: str) -> bool:
        return self._held.get(process, self) is not None

    def is_suspended(self, process: str) -> bool:
        return process in self._held

    def kill(self, process: str) -> None:
        """None of its callbacks run any more, not even the cleanup of its tasks."""
        # Python would run the cleanup of the tasks as soon as nothing refers to them.
        self._kept += asyncio.all_tasks(self)
        self._held[process] = None

    def suspend(self, process: str) -> None:
        if self.is_alive(process):
            self._held.setdefault(process, [])

    def resume(self, process: str, order: ThawOrder) -> None:
        held = self._held.get(process)
        if held is None:
            return
        del self._held[process]
        messages = [handle for handle in held if isinstance(handle, MessageHandle)]
        timers = [handle for handle in held if not isinstance(handle, MessageHandle)]
        due = {"as it came": held, "timers first": timers + messages, "messages first": messages + timers}
        self._ready.extend(due[order])  # type: ignore[attr-defined]

    def jump(self, process: str, seconds: float) -> None:
        """Moves the clock of a process forward: its timers are due that much earlier."""
        self._offsets[process] = self._offsets.get(process, 0.0) + seconds
        self._timers[:] = [
            (when - seconds if self._is_timer_of(process, handle) else when, serial, handle)
            for when, serial, handle in self._timers
        ]
        heapq.heapify(self._timers)

    def jump_wall_of(self, process: str, seconds: float) -> None:
        self._wall_offsets[process] = self._wall_offsets.get(process, 0.0) + seconds

    def _is_timer_of(self, process: str, handle: asyncio.Handle) -> bool:
        return not isinstance(handle, MessageHandle) and _process_of(handle) == process

    def _is_held(self, handle: asyncio.Handle) -> bool:
        process = _process_of(handle)
        if process not in self._held:
            return False
        if (held := self._held[process]) is not None:
            held.append(handle)
        return True


class SimulatedProcess:
    """One process of a simulated cluster.

    Attributes:
        id: Differs between processes of one name.
    """

    def __init__(self, loop: ProcessLoop, name: str, process_id: str) -> None:
        self.name = name
        self.id = process_id
        self._loop = loop
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, process_id)

    @property
    def is_alive(self) -> bool:
        return self._loop.is_alive(self.id)

    @property
    def is_suspended(self) -> bool:
        return self._loop.is_suspended(self.id) and self.is_alive

    @property
    def is_running(self) -> bool:
        return not self._loop.is_suspended(self.id)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function now, as a part of the process."""
        return self._context.copy().run(function, *args)

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Calls a function as a part of the process: later if it is suspended, never if it is dead."""
        self._loop.call_soon(function, *args, context=self._context.copy())

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return self._loop.create_task(work, context=self._context.copy())

    def kill(self) -> None:
        self._loop.kill(self.id)

    def suspend(self) -> None:
        self._loop.suspend(self.id)

    def resume(self, order: ThawOrder = "as it came") -> None:
        self._loop.resume(self.id, order)

    def jump(self, seconds: float) -> None:
        self._loop.jump(self.id, seconds)

    def jump_wall(self, seconds: float) -> None:
        self._loop.jump_wall_of(self.id, seconds)


@contextlib.contextmanager
def wall_clock(loop: ProcessLoop) -> Iterator[None]:
    """`time.time` and `time.time_ns` are the wall clocks of the processes of a loop."""
    originals = {"time": time.time, "time_ns": time.time_ns}
    vars(time).update(time=loop.wall_s, time_ns=lambda: int(loop.wall_s() * 1e9))
    try:
        yield
    finally:
        vars(time).update(originals)


def _silence(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


def _process_of(handle: asyncio.Handle) -> str:
    return handle._context.get(PROCESS, "")  # type: ignore[attr-defined, no-any-return]
