"""Helpers for asyncio: tasks that end with the object that started them, timers, and settling futures."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class BackgroundTasks:
    """A set of tasks that are cancelled together, and whose exceptions are reported.

    Args:
        on_failure: Called with the exception of a failed task; by default it is logged.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel(self) -> None:
        """Cancels all tasks and waits for them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if self._on_failure is not None:
                self._on_failure(error)
            else:
                logger.error("background task failed", exc_info=error)


class Timer:
    """Calls `on_timer` once, some time after the last `set`."""

    def __init__(self, on_timer: Callable[[], None]) -> None:
        self._on_timer = on_timer
        self._handle: asyncio.TimerHandle | None = None

    def set(self, delay_s: float | None) -> None:
        """Starts anew; None only stops."""
        if self._handle is not None:
            self._handle.cancel()
        if delay_s is not None:
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._on_timer)


def settle(future: "asyncio.Future[T]", result: T | BaseException) -> None:
    """Gives a future its result or exception, unless it was cancelled."""
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
