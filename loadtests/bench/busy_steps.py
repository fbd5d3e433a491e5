"""A thread that is busy as the step thread of an engine is."""

import threading
import time
from types import TracebackType
from typing import Any

#: Of one step on an idle core, in seconds: matrix products release the GIL, then Python holds it.
PRODUCTS_S, PYTHON_S = 0.012, 0.004

#: Rows and columns of a matrix: a product takes about 1 ms, as the larger operations of a step do.
MATRIX = 320


class BusySteps:
    """Steps of equal work, one after the other. Use as a context; it begins at rest.

    Products use one thread, so that the other core of two is free for what is measured. What else uses the
    GIL, the cores or the memory's bandwidth makes steps longer: `take` tells by how much.
    """

    def __init__(self) -> None:
        import torch

        self._torch, self._threads_before = torch, torch.get_num_threads()
        torch.set_num_threads(1)
        self._matrix: Any = torch.rand(MATRIX, MATRIX)
        self._products = max(1, round(PRODUCTS_S / _seconds(self._multiply, 20)))
        self._turns = max(1, round(PYTHON_S / _seconds(self._count, 10_000)))
        self._steps_ms: list[float] = []
        self._goes, self._step = threading.Event(), threading.Lock()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="busy-steps", daemon=True)

    def __enter__(self) -> "BusySteps":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends = True
        self._goes.set()
        self._thread.join()
        self._torch.set_num_threads(self._threads_before)

    def take(self) -> list[float]:
        """Durations in ms of the steps that have ended since the last call."""
        steps_ms, self._steps_ms = self._steps_ms, []
        return steps_ms

    def go(self) -> None:
        """Steps follow each other from now on."""
        self._goes.set()

    def rest(self) -> None:
        """No step begins any more. Returns when the last one has ended."""
        self._goes.clear()
        with self._step:
            pass

    def _run(self) -> None:
        self._torch.set_num_threads(1)  # for each thread
        while not self._ends:
            self._goes.wait()
            with self._step:
                if self._goes.is_set():
                    began = time.perf_counter()
                    self._multiply(self._products)
                    self._count(self._turns)
                    self._steps_ms.append((time.perf_counter() - began) * 1e3)

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            self._matrix @ self._matrix

    def _count(self, times: int) -> int:
        count = 0
        for number in range(times):
            count += number & 1
        return count


def _seconds(work: Any, times: int) -> float:
    """CPU time of one unit of some work: the least of five trials."""
    trials = []
    for _ in range(5):
        began = time.thread_time()
        work(times)
        trials.append((time.thread_time() - began) / times)
    return min(trials)
