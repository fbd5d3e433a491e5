"""Steps vLLM's `EngineCore` in its own thread, with calls from the event loop between the steps."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from migration.engine_interface import StepProgress
from migration.errors import EngineDeadError
from migration.tasks import settle

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StepLoop:
    """The step thread: all of vLLM runs there, from building the core to its last step.

    Calls become closures in the thread's queue and run between two steps, in order; their results go
    back to the loop. While there is nothing to step, the thread sleeps in that queue.

    Args:
        build: Builds the core.
        on_outputs: Takes a step's outputs.
        on_boundary: Called between two steps, after calls and after a step.
        on_idle: Called before the thread sleeps.
        on_death: Called, on the event loop, when a step has failed; nothing more will run.
    """

    def __init__(
        self,
        build: Callable[[], EngineCore],
        *,
        on_outputs: Callable[[dict[int, EngineCoreOutputs]], None],
        on_boundary: Callable[[], None],
        on_idle: Callable[[], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._build = build
        self._on_outputs = on_outputs
        self._on_boundary = on_boundary
        self._on_idle = on_idle
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._stopping = False
        self._dead: BaseException | None = None
        self._turns = self._steps = 0
        self._is_busy = False
        self._core: EngineCore = None
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    async def start(self) -> None:
        """Raises: whatever `build` raises."""
        self._thread.start()
        await self._ready

    async def stop(self) -> None:
        """Ends the workers' processes, and the thread, after the step it is in."""
        self._stopping = True
        self._calls.put(lambda: None)
        await asyncio.to_thread(self._thread.join, 5.0)

    @property
    def progress(self) -> StepProgress:
        return StepProgress(self._turns, self._steps, self._is_busy)

    def submit(self, call: Callable[[], None]) -> None:
        """Runs `call` between two steps. Raises: EngineDeadError: it never would."""
        if self._dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self._dead}")
        self._calls.put(call)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between two steps and returns, or raises, what it does."""
        future: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                result: Any = function()
            except Exception as error:
                result = error
            self.settle(future, result)

        self.submit(call)
        return await future

    def settle(self, future: "asyncio.Future[Any]", result: Any) -> None:
        """Gives a future of the event loop its result, or its exception. For the step thread."""
        self.notify(settle, future, result)

    def fail(self) -> None:
        """Reports that the core can make no further step, from any thread. The step in progress may hang."""
        self._dead = EngineDeadError("a worker's process has ended")
        self.notify(self._on_death, self._dead)

    def notify(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Calls back on the event loop. For the step thread."""
        self._loop.call_soon_threadsafe(callback, *arguments)

    # ---- the step thread

    def _run(self) -> None:
        try:
            self._core = self._build()
        except BaseException as error:
            self._dead = error
            self.settle(self._ready, error)
            return
        self.settle(self._ready, None)
        try:
            self._is_busy = True
            while not self._stopping:
                self._turns += 1
                self._run_calls()
                self._step()
            if not isinstance(self._core.model_executor, UniProcExecutor):
                self._core.model_executor.shutdown()  # the kernel ends workers with the thread
        except BaseException as error:
            self._dead = error
            logger.exception("the engine's step loop has failed")
            self.notify(self._on_death, error)

    def _has_work(self) -> bool:
        return bool(self._core.scheduler.has_requests() or self._core.batch_queue)

    def _run_calls(self) -> None:
        turns = self._turns
        if not self._has_work() and not self._stopping:
            self._on_idle()
            self._is_busy = False
            call = self._calls.get()
            self._is_busy = True
            self._turns += 1
            call()
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            self._turns += 1
            call()
        if self._turns > turns:  # the last step has had its boundary
            self._on_boundary()

    def _step(self) -> None:
        if not self._has_work():
            return
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        self._steps += 1
        if outputs:
            self._on_outputs(outputs)
        elif not executed:
            time.sleep(0.001)  # everything waits (for blocks, a grammar): as vLLM's own loop does
        self._on_boundary()
