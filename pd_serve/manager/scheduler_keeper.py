"""Keeps one scheduler running, and has its last report."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import SchedulerState, SchedulerStats
from pd_serve.comm.leases import LeaseClock, Leases
from pd_serve.comm.membership import SCHEDULER
from pd_serve.comm.timing import (
    EARLY_SCHEDULER_DEATH_S,
    HEARTBEAT_S,
    MAX_DEATH_PAUSE_S,
    SCHEDULER_HANG_S,
    SCHEDULER_LEASE_S,
    SCHEDULER_START_TIMEOUT_S,
)
from pd_serve.errors import EngineDeadError
from pd_serve.manager.launcher import Launcher
from pd_serve.scheduler.scheduler_process import SchedulerConfig

logger = logging.getLogger(__name__)


class SchedulerKeeper:
    """Starts the scheduler, and starts another one whenever it has died or hangs.

    Args:
        may_start: Called before every start. If it returns False, no more schedulers are started.
        on_start: Called with the address of every scheduler that has started.
        warn: Shows a warning to the operator.

    Attributes:
        address: Address of the last started scheduler; "" before the first one.
    """

    def __init__(
        self,
        launcher: Launcher,
        config: SchedulerConfig,
        clock: LeaseClock,
        may_start: Callable[[], Awaitable[bool]],
        on_start: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._launcher = launcher
        self._config = config
        self._may_start = may_start
        self._on_start = on_start
        self._warn = warn
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._lease = Leases(SCHEDULER_HANG_S, clock)
        self._reported_at: float | None = None
        self._pid: int | None = None
        self._starts = 0
        self._stats: SchedulerStats | None = None
        self.address = ""

    def open(self) -> None:
        self._tasks.start(self._keep())

    async def close(self) -> None:
        await self._tasks.cancel()

    def on_report(self, stats: SchedulerStats | None) -> None:
        self._reported_at = self._loop.time()
        self._lease.renew(SCHEDULER)
        self._stats = stats or self._stats

    @property
    def is_alive(self) -> bool:
        return self._reported_at is not None and self._loop.time() - self._reported_at < SCHEDULER_LEASE_S

    @property
    def state(self) -> SchedulerState:
        alive = "alive" if self.is_alive else "absent"
        return SchedulerState(alive, self._config.policies.name, self._pid, max(0, self._starts - 1))

    @property
    def stats(self) -> SchedulerStats | None:
        """Last metrics of the scheduler; None while it is absent."""
        return self._stats if self.is_alive else None

    async def _keep(self) -> None:
        """Starts another scheduler after each, after a pause if it ended soon after its start."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            if not await self._may_start():
                return
            began = self._loop.time()
            try:
                async with asyncio.timeout(SCHEDULER_START_TIMEOUT_S):
                    self.address, self._pid = await self._launcher.start_scheduler(self._config)
                self._starts += 1
                self._on_start(self.address)
                what = await self._watch()
                self._warn(f"the scheduler {what} and is started again; requests continue")
            except Exception as error:  # whatever it is, there has to be another try
                if not isinstance(error, EngineDeadError):
                    logger.exception("starting the scheduler failed")
                why = str(error) or "the scheduler does not start in time"
                self._warn(f"{why}; no request is moved and no pool scaled meanwhile")
                await self._launcher.stop_scheduler()
            self._reported_at = self._pid = None
            lived_s = self._loop.time() - began
            pause_s = 0.0 if lived_s > EARLY_SCHEDULER_DEATH_S else min(pause_s + 1.0, MAX_DEATH_PAUSE_S)

    async def _watch(self) -> str:
        """Returns when the scheduler has died, or has been ended because it hangs; and which of the two."""
        self._lease.renew(SCHEDULER)
        ended = asyncio.ensure_future(self._launcher.scheduler_ended())
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=HEARTBEAT_S)
                if self._lease.expired() and not ended.done():
                    await self._launcher.stop_scheduler()
                    return "hangs"
        finally:
            ended.cancel()
        return "has died"
