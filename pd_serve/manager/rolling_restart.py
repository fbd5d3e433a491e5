"""Rolling restart: replaces all instances, one after another, while requests continue."""

import asyncio
from collections.abc import Callable

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import RestartState
from pd_serve.comm.timing import POLL_S
from pd_serve.errors import MigrationRefusedError
from pd_serve.manager.decision_log import DecisionLog
from pd_serve.manager.launcher import RestartNotes
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.starter import Starter
from pd_serve.manager.stopper import Stopper


class RollingRestart:
    """Replaces all instances on demand. At most one restart runs at a time.

    Args:
        on_change: Called when `notes` have changed.
    """

    def __init__(
        self,
        register: InstanceRegister,
        starter: Starter,
        stopper: Stopper,
        log: DecisionLog,
        on_change: Callable[[], None],
    ) -> None:
        self._register = register
        self._starter = starter
        self._stopper = stopper
        self._log = log
        self._on_change = on_change
        self._tasks = BackgroundTasks()
        self._task: asyncio.Task[None] | None = None
        self._progress = ""
        self._total = 0
        self._remaining: list[str] = []
        self._replacement = ""

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def state(self) -> RestartState:
        return RestartState(self._task is not None, self._progress)

    @property
    def notes(self) -> RestartNotes | None:
        """For the next manager; None if no restart runs."""
        if self._task is None:
            return None
        return RestartNotes(self._total, list(self._remaining), self._replacement)

    @property
    def spare(self) -> str:
        """The replacement, while the instance that it replaces is in use; "" otherwise."""
        in_use = self._remaining and self._is_in_use(self._remaining[0])
        return self._replacement if in_use else ""

    def is_replacing(self, instance_id: str) -> bool:
        return bool(self._replacement) and self._remaining[0] == instance_id

    def begin(self) -> None:
        """Begins a restart. Raises: MigrationRefusedError: A restart is running."""
        if self._task is not None:
            raise MigrationRefusedError(f"a restart is under way: {self._progress}")
        instances = list(self._register.roles())
        self.resume(RestartNotes(len(instances), instances))

    def resume(self, notes: RestartNotes) -> None:
        """Continues a restart, of the last manager for example."""
        self._total, self._remaining = notes.total, list(notes.remaining)
        self._replacement, self._progress = notes.replacement, "begins"
        self._task = self._tasks.start(self._replace_all())
        self._on_change()

    def cancel(self) -> None:
        """Ends the restart. An instance that drains for it is used again in the place of its replacement.

        Raises: MigrationRefusedError: No restart is running.
        """
        if self._task is None:
            raise MigrationRefusedError("no restart is under way")
        self._task.cancel()
        if self._replacement and (old := self._remaining[0]) in self._stopper.leaving:
            self._stopper.drain(old, False, "the restart is cancelled")
        self._end(f"cancelled after {self._num_done} of {self._total}")

    @property
    def _num_done(self) -> int:
        return self._total - len(self._remaining)

    def _is_in_use(self, instance_id: str) -> bool:
        return instance_id in self._register and instance_id not in self._stopper.leaving

    async def _replace_all(self) -> None:
        while self._remaining:
            old = self._remaining[0]
            self._progress = f"{self._num_done} of {self._total} done, now {old}"
            serves = self._is_in_use(old) or (self._replacement and old in self._register)
            if serves and (why := await self._replace(old)) is not None:
                return self._end(f"given up after {self._num_done} of {self._total}: {why}")
            self._remaining.pop(0)
            self._replacement = ""
            self._on_change()
        self._end(f"{self._total} of {self._total} done")

    def _end(self, progress: str) -> None:
        self._stop_spare()
        self._task, self._remaining, self._replacement, self._progress = None, [], "", progress
        self._log.add(f"restart: {progress}")
        self._on_change()

    async def _replace(self, old: str) -> str | None:
        """Replaces one instance. Returns the reason if it is given up, None if it has succeeded."""
        if self._replacement not in self._register:
            role = self._register.role_of(old)
            name = self._replacement = self._starter.new_id(role, f"in the place of {old}, by a restart")
            self._on_change()
            start = self._tasks.start(self._starter.bring_up(name, role))
            try:
                while not start.done():
                    await asyncio.wait([start], timeout=POLL_S)
                    if old in self._stopper.leaving:  # its pool has been made smaller
                        self._stop(name)
                        return None
            finally:
                start.cancel()
            if not start.result():
                return f"{name} has not started"
            if name not in self._register:
                return f"{name} has died"
        if self._is_in_use(old):
            self._stopper.drain(old, True, "by a restart")
            self._stopper.stop_drained(old, "by a restart")
        while old in self._register:
            if old not in self._stopper.leaving:
                return f"{old} is used again"
            await asyncio.sleep(POLL_S)
        return None

    def _stop_spare(self) -> None:
        if name := self.spare:
            self._stop(name)

    def _stop(self, replacement: str) -> None:
        if replacement not in self._register:
            return
        why = f"{self._remaining[0]} is not replaced"
        self._stopper.drain(replacement, True, why)
        self._stopper.stop_drained(replacement, why)
