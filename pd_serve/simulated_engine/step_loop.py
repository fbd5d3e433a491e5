"""The steps of a simulated engine on the event loop, and the calls that are carried out between them."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from migration.engine_interface import StepProgress
from migration.errors import EngineDeadError, MigrationError
from migration.tasks import settle
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.batcher import Step
from pd_serve.simulated_engine.decode_run import DecodeRun

T = TypeVar("T")


class Stepping(Protocol):
    """What a step loop drives."""

    def schedule(self) -> Step | None:
        """Decides the next step; None if there is nothing to do."""

    def begin(self, step: Step) -> float:
        """A step begins. Returns its duration in seconds."""

    def plan(self, step: Step, ends_at: float) -> DecodeRun | None:
        """The steps from this one on that are one event; None if the next one has to be decided."""

    def catch_up(self, run: DecodeRun, steps: int) -> None:
        """The first steps of a run have ended."""

    def finish(self, step: Step) -> None:
        """A step has ended: sends its tokens, unless they may wait for later ones."""

    def at_boundary(self) -> None:
        """Called between two steps, after the calls."""

    def report(self) -> None:
        """Called between two steps, once the next one has been decided."""


class SimulatedStepLoop:
    """Runs one step after another as long as there is work.

    Args:
        one_ahead: Decides a step before the calls of the boundary at which it begins, as an engine that
            schedules while the previous step still runs: a request that is suspended there drains with it.

    Attributes:
        in_flight: The step in progress.
        run: The run of steps in progress; None if each step is an event.
    """

    def __init__(self, engine: Stepping, *, one_ahead: bool) -> None:
        self.in_flight: Step | None = None
        self.run: DecodeRun | None = None
        self._engine = engine
        self._one_ahead = one_ahead
        self._loop = asyncio.get_running_loop()
        self._calls: list[Callable[[], None]] = []
        self._timer: asyncio.Handle | None = None
        self._stopped = False
        self._turns = self._steps = 0

    @property
    def progress(self) -> StepProgress:
        ended = self.run.num_ended(self._loop.time()) if self.run is not None else 0
        return StepProgress(self._turns + ended, self._steps + ended, self.in_flight is not None)

    def stop(self) -> None:
        """No step and no call follows; callers wait until they are cancelled."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def submit(self, call: Callable[[], None]) -> None:
        """Runs `call` between two steps. Raises: EngineDeadError: the engine has stopped."""
        if self._stopped:
            raise EngineDeadError("the engine has stopped")
        self._calls.append(call)
        if self._timer is None:
            self._timer = self._loop.call_soon(self._boundary)
        else:
            self.cut_run()

    def cut_run(self) -> None:
        """The run in progress, if there is one, ends with the step in progress."""
        if self.run is not None and self.run.cut(self._loop.time()):
            assert self._timer is not None
            self._timer.cancel()
            self._timer = self._loop.call_at(self.run.ends[-1], self._boundary, self.run.step)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between two steps and returns, or raises, what it does."""
        future: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                result: T | BaseException = function()
            except (MigrationError, InvalidRequestError) as error:
                result = error
            settle(future, result)

        self.submit(call)
        return await future

    def _boundary(self, ended: Step | None = None) -> None:
        self._timer = self.in_flight = None
        if (run := self.run) is not None:
            before = len(run.ends) - 1
            self._engine.catch_up(run, before)
            self._turns += before
            self._steps += before
            self.run = None
        self._turns += 1
        step = None
        if ended is not None:
            self._steps += 1
            self._engine.finish(ended)
            if self._one_ahead:
                step = self.in_flight = self._engine.schedule()
        while self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()
        self._engine.at_boundary()
        if step is None:
            step = self.in_flight = self._engine.schedule()
        self._engine.report()
        if step is not None:
            ends_at = self._loop.time() + self._engine.begin(step)
            self.run = None if self._one_ahead else self._engine.plan(step, ends_at)
            if self.run is None:
                self._timer = self._loop.call_at(ends_at, self._boundary, step)
            else:
                self._continue(self.run)

    def _continue(self, run: DecodeRun) -> None:
        report = run.next_report()
        if report is None:
            self._timer = self._loop.call_at(run.ends[-1], self._boundary, run.step)
        else:
            self._timer = self._loop.call_at(run.ends[report], self._report_in_run, run)

    def _report_in_run(self, run: DecodeRun) -> None:
        self._engine.report()
        self._continue(run)
