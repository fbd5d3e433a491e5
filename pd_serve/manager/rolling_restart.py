"""Rolling restart: replaces all instances, one after another, while requests continue."""

import asyncio

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import RestartState
from pd_serve.comm.timing import POLL_S
from pd_serve.errors import MigrationRefusedError
from pd_serve.manager.decision_log import DecisionLog
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.starter import Starter
from pd_serve.manager.stopper import Stopper


class RollingRestart:
    """Replaces all instances on demand. At most one restart runs at a time."""

    def __init__(
        self, register: InstanceRegister, starter: Starter, stopper: Stopper, log: DecisionLog
    ) -> None:
        self._register = register
        self._starter = starter
        self._stopper = stopper
        self._log = log
        self._tasks = BackgroundTasks()
        self._progress = ""

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def state(self) -> RestartState:
        return RestartState(bool(len(self._tasks)), self._progress)

    def begin(self) -> None:
        """Begins a restart. Raises: MigrationRefusedError: A restart is running."""
        if len(self._tasks):
            raise MigrationRefusedError(f"a restart is under way: {self._progress}")
        self._progress = "begins"
        self._tasks.start(self._replace_all(self._register.roles()))

    async def _replace_all(self, roles: dict[str, str]) -> None:
        for done, (old, role) in enumerate(roles.items()):
            self._progress = f"{done} of {len(roles)} done, now {old}"
            if old not in self._register or old in self._stopper.leaving:
                continue  # it has died, or was stopped
            if (why := await self._replace(old, role)) is not None:
                self._progress = f"given up after {done} of {len(roles)}: {why}"
                self._log.add(f"restart {self._progress}")
                return
        self._progress = f"{len(roles)} of {len(roles)} done"
        self._log.add(f"restart: {self._progress}")

    async def _replace(self, old: str, role: str) -> str | None:
        """Replaces one instance. Returns the reason if it is given up, None if it has succeeded."""
        name = self._starter.new_id(role, f"in the place of {old}, by a restart")
        if not await self._starter.bring_up(name, role):
            return f"{name} has not started"
        if name not in self._register:
            return f"{name} has died"
        self._stopper.drain(old, True, "by a restart")
        self._stopper.stop_drained(old, "by a restart")
        while old in self._register:
            if old not in self._stopper.leaving:
                return f"{old} is used again"
            await asyncio.sleep(POLL_S)
        return None
