"""Records the steps of an engine core for `bench step`."""

import threading
import time
from typing import Any, NamedTuple


class RecordedStep(NamedTuple):
    """One step, from its beginning to that of the next one.

    Attributes:
        requests, tokens: Scheduled in it. They are equal where all requests decode.
        ms: Wall time.
        thread_ms, process_ms: CPU time of the step thread, and of all threads of the process.
    """

    requests: int
    tokens: int
    ms: float
    thread_ms: float
    process_ms: float


class StepClock:
    """Records the steps of a core, and can hold them. Its hooks run on the step thread.

    Args:
        core: vLLM's `EngineCore`, with any scheduler.
    """

    def __init__(self, core: Any) -> None:
        self._may_step = threading.Event()
        self._may_step.set()
        self._was_idle = False
        self._lock = threading.Lock()
        self._steps: list[RecordedStep] = []
        self._scheduled = (0, 0)
        self._began: tuple[float, float, float] | None = None
        self._step_fn, core.step_fn = core.step_fn, self._step
        self._schedule, core.scheduler.schedule = core.scheduler.schedule, self._recorded_schedule

    def hold(self) -> None:
        """The next step waits for `go`, and with it all calls that come after it."""
        self._may_step.clear()

    def go(self) -> None:
        """Ends a hold. A step that began before does not count: the engine may have been idle."""
        self._was_idle = True
        self._may_step.set()

    def take(self) -> list[RecordedStep]:
        """The steps since the last call, oldest first; without the one in progress."""
        with self._lock:
            steps, self._steps = self._steps, []
        return steps

    def _step(self) -> Any:
        now = _clocks()
        if self._began is not None and self._scheduled[0] and not self._was_idle:
            times = [(after - before) * 1e3 for before, after in zip(self._began, now, strict=True)]
            with self._lock:
                self._steps.append(RecordedStep(*self._scheduled, *times))
        if not self._may_step.is_set():
            self._may_step.wait()
            now = _clocks()
        self._was_idle, self._began, self._scheduled = False, now, (0, 0)
        return self._step_fn()

    def _recorded_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self._scheduled = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
        return output


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time()
