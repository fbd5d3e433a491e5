"""The instances of a service as a number that changes: carries out what the scheduler, or somebody, wants.

Starting and stopping are given as two functions, so that it is the same on Ray and in a simulation.
"""

import asyncio
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from migration.errors import PdServeError
from migration.tasks import OwnedTasks
from pd_serve import metrics
from pd_serve.api.cluster_view import MigrationRefusedError, UnknownTargetError
from pd_serve.instance import InstanceInfo
from pd_serve.messages import SchedulerReport, SetDraining, StartInstance, StopInstance
from pd_serve.request_router import RequestRouter
from pd_serve.route import Migrated
from pd_serve.scheduler_process import SCHEDULER

logger = logging.getLogger(__name__)

#: How long a start may take.
START_S = 600.0

#: After a start that failed, the next one waits: so long at first, twice as long each time, at most so long.
RETRY_S, MAX_RETRY_S = 5.0, 120.0

#: How long an instance that the scheduler found empty may take to be empty for us too. Then it is stopped
#: all the same, and what is still there is computed again elsewhere.
EMPTY_S = 10.0

POLL_S = 0.05

#: A scheduler that has said nothing for so long is not there.
SCHEDULER_LEASE_S = 3.0

NUM_DECISIONS = 20


class Fleet:
    """Implements `ClusterView`: the router's view, and what is coming and going.

    Args:
        start: Starts an instance by id and role and returns when it is ready. Raises: PdServeError.
        stop: Ends an instance that the router has left.
        max_instances: Never more than so many at a time, coming ones included.
        instances: How many there are at the start, by role; the next id counts from there.
    """

    def __init__(
        self,
        router: RequestRouter,
        start: Callable[[str, str], Awaitable[InstanceInfo]],
        stop: Callable[[str], Awaitable[None]],
        *,
        max_instances: int,
        instances: Mapping[str, int],
        policy: str = "",
    ) -> None:
        self._router = router
        self._start = start
        self._stop = stop
        self._max_instances = max_instances
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._tasks = OwnedTasks()
        self._starting: dict[str, str] = {}
        self._stopping: set[str] = set()
        self._by_hand: set[str] = set()
        self._numbers = {role: itertools.count(number) for role, number in instances.items()}
        self._retry_at = 0.0
        self._retry_s = RETRY_S
        self._decisions: deque[tuple[float, str]] = deque(maxlen=NUM_DECISIONS)
        self._scheduler_heard_at: float | None = None
        self._scheduler_pid: int | None = None
        self._scheduler_starts = 0

    async def close(self) -> None:
        await self._tasks.cancel()

    # ---- the scheduler

    def scheduler_started(self, address: str, pid: int) -> None:
        """A scheduler is there: the first, or one in the place of a dead one."""
        if self._scheduler_starts:
            metrics.SCHEDULER_RESTARTS.inc()
        self._scheduler_starts += 1
        self._scheduler_pid = pid
        self._router.instances.introduce_scheduler(SCHEDULER, address)

    def scheduler_lost(self) -> None:
        self._scheduler_heard_at = self._scheduler_pid = None

    def on_decided(self, report: SchedulerReport) -> None:
        """What the scheduler has told instances; nothing, as a heartbeat.

        What it says to an instance that is drained by hand does not count there, nor here.
        """
        self._scheduler_heard_at = self._loop.time()
        for line in report.decided:
            if line.split()[0] not in self._by_hand:
                self._decided(line)

    def on_scaling(self, wanted: StartInstance | StopInstance) -> None:
        """What the scheduler wants. Who wants the same twice gets it once."""
        match wanted:
            case StartInstance(role=role, reason=reason):
                self._start_one(role, reason)
            case StopInstance(instance_id=instance_id, reason=reason):
                if instance_id not in self._by_hand:
                    self._stop_when_empty(instance_id, reason, EMPTY_S)

    def _decided(self, line: str) -> None:
        logger.info("%s", line)
        self._decisions.append((self._loop.time(), line))

    # ---- starting

    def _start_one(self, role: str, reason: str) -> None:
        coming = [name for name in self._starting if name not in self._router.instances]
        if len(list(self._router.instances)) + len(coming) >= self._max_instances:
            logger.debug("no further %s instance: %d are all there may be", role, self._max_instances)
        elif self._loop.time() < self._retry_at:
            logger.debug("no further %s instance yet: the last one did not start", role)
        else:
            # Ids are not used again: somebody may still speak of the former one.
            name = f"{role}-{next(self._numbers[role])}"
            self._starting[name] = role
            self._decided(f"{name} is started: {reason}")
            self._tell_starting()
            self._tasks.start(self._bring_up(name, role))

    async def _bring_up(self, name: str, role: str) -> None:
        try:
            async with asyncio.timeout(START_S):
                info = await self._start(name, role)
                self._router.join(info)
                # Counted as coming until it reports: in between a scheduler would miss it, and ask again.
                while name in self._router.instances and self._router.load_of(name) is None:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except (PdServeError, TimeoutError) as error:
            self._decided(f"{name} has not started: {error or f'not ready after {START_S:.0f} s'}")
            self._retry_at = self._loop.time() + self._retry_s
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
        else:
            self._retry_s = RETRY_S
            metrics.SCALED.labels("start", role).inc()
        finally:
            del self._starting[name]
            self._tell_starting()

    def _tell_starting(self) -> None:
        self._router.instances.starting = Counter(self._starting.values())
        self._router.instances.greet()

    # ---- stopping

    def _stop_when_empty(self, instance_id: str, reason: str, patience_s: float) -> None:
        if instance_id in self._router.instances and instance_id not in self._stopping:
            self._stopping.add(instance_id)
            self._tasks.start(self._take_down(instance_id, reason, self._loop.time() + patience_s))

    async def _take_down(self, instance_id: str, reason: str, deadline: float) -> None:
        by_hand = instance_id in self._by_hand
        try:
            while True:
                await asyncio.sleep(POLL_S)
                load = self._router.load_of(instance_id)
                if load is None or (instance_id not in self._by_hand if by_hand else not load.draining):
                    return  # it has died, or is needed again
                if self._loop.time() > deadline or (load.draining and self._router.is_empty(instance_id)):
                    break
            self._router.leave(instance_id)
            await self._stop(instance_id)
            self._decided(f"{instance_id} is stopped: {reason}")
            metrics.SCALED.labels("stop", load.role).inc()
        finally:
            self._stopping.discard(instance_id)
            self._by_hand.discard(instance_id)

    # ---- ClusterView

    @property
    def num_waiting(self) -> int:
        return self._router.num_waiting

    @property
    def num_live(self) -> int:
        return self._router.num_live

    async def migrate(self, request_id: str, destination: str) -> Migrated:
        return await self._router.migrate(request_id, destination)

    def find_requests(self, name: str) -> list[dict[str, Any]]:
        return self._router.find_requests(name)

    async def check_integrity(self) -> list[str]:
        return await self._router.check_integrity()

    def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        if instance_id not in self._router.instances:
            raise UnknownTargetError(f"no instance {instance_id!r}; see GET /cluster")
        if not draining:
            self._by_hand.discard(instance_id)
        else:
            if (why := self._router.last_of_its_kind(instance_id)) is not None:
                raise MigrationRefusedError(why)
            self._by_hand.add(instance_id)
        self._router.instances.send(instance_id, SetDraining(draining, by_hand=True))
        self._decided(f"{instance_id} is {'drained' if draining else 'used again'}: asked for by hand")
        if draining and stop:
            self._stop_when_empty(instance_id, "drained by hand", math.inf)

    def snapshot(self) -> dict[str, Any]:
        snapshot = self._router.snapshot()
        unknown = dict.fromkeys(
            ("total_blocks", "free_blocks", "running", "waiting", "migrating_in", "migrating_out"), 0
        )
        snapshot["instances"] += [
            {"id": name, "role": role, "state": "starting", "draining": False, "node": "", "pid": 0}
            | unknown
            | {"freeness": 0.0}
            for name, role in self._starting.items()
            if name not in self._router.instances
        ]
        now, heard_at = self._loop.time(), self._scheduler_heard_at
        snapshot["scheduler"] = {
            "state": "alive" if heard_at is not None and now - heard_at < SCHEDULER_LEASE_S else "absent",
            "policy": self._policy,
            "pid": self._scheduler_pid,
            "restarts": max(0, self._scheduler_starts - 1),
        }
        snapshot["decisions"] = [
            {"seconds_ago": round(now - at, 1), "what": line} for at, line in reversed(self._decisions)
        ]
        return snapshot
