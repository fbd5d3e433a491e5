"""The instances of a service as a number that changes: carries out what the scheduler, or somebody, wants.

Starting and stopping are given as two functions, so that it is the same on Ray and in a simulation.
"""

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import InstanceInfo, SchedulerReport, SetDraining, StartInstance, StopInstance
from pd_serve.comm.roster import InstanceRegistry
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    PdServeError,
    UnknownTargetError,
)
from pd_serve.scheduler.scheduler_process import SCHEDULER
from router.scaling import PoolBounds

logger = logging.getLogger(__name__)

#: How long a start may take, waiting for resources included.
START_S = 600.0

#: After a start that failed, the next one waits: so long at first, twice as long each time, at most so long.
RETRY_S, MAX_RETRY_S = 5.0, 120.0

#: An instance that dies sooner counts as a start that failed.
LIFE_S = 60.0

#: How long an instance that the scheduler found empty may take to be empty for us too. Then it is stopped
#: all the same, and what is still there is computed again elsewhere.
EMPTY_S = 10.0

POLL_S = 0.05

#: A scheduler that has said nothing for so long is not there.
SCHEDULER_LEASE_S = 3.0

NUM_DECISIONS = 20


class InstancePool:
    """What is coming and going.

    Args:
        roster: Knows who is there; told of who joins and leaves.
        start: Starts an instance by id and role and returns when it is ready. Raises: PdServeError.
        stop: Ends an instance that the roster has left.
        max_instances: The scheduler gets never more than so many at a time, coming ones included.
        instances: How many there are at the start, by role; the next id counts from there.
        autoscale: Bounds by role, for the pools whose size is the scheduler's.
        replaces: Another instance is started in the place of one that has died, in the other pools.
        waits_for: What a coming instance waits for, in words; "" if for nothing but itself.
        on_change: Called when `state`, or who is leaving, has changed.
    """

    def __init__(
        self,
        roster: InstanceRegistry,
        start: Callable[[str, str], Awaitable[InstanceInfo]],
        stop: Callable[[str], Awaitable[None]],
        *,
        max_instances: int,
        instances: Mapping[str, int],
        autoscale: Mapping[str, PoolBounds] | None = None,
        policy: str = "",
        replaces: bool = False,
        waits_for: Callable[[str], str] = lambda name: "",
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._roster = roster
        self._start = start
        self._stop = stop
        self._max_instances = max_instances
        self._autoscale = autoscale or {}
        self._policy = policy
        self._replaces = replaces
        self._waits_for = waits_for
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._starting: dict[str, str] = {}
        self._owed: list[tuple[str, str]] = []  # role and reason of starts that are tried until they succeed
        self._owing = asyncio.Event()
        self._ready_at: dict[str, float] = {}
        self._stopping: set[str] = set()
        self._by_hand: set[str] = set()
        self._wanted = dict(instances)
        self._next_numbers = dict(instances)
        self._retry_at = 0.0
        self._retry_s = RETRY_S
        self._decisions: deque[tuple[float, str]] = deque(maxlen=NUM_DECISIONS)
        self._scheduler_heard_at: float | None = None
        self._scheduler_pid: int | None = None
        self._scheduler_starts = 0
        self._scaled: Counter[tuple[str, str]] = Counter()
        self._restart: asyncio.Task[None] | None = None
        self._restarted = ""
        self._tasks.start(self._pay())

    async def close(self) -> None:
        await self._tasks.cancel()

    # ---- the scheduler

    def scheduler_started(self, address: str, pid: int) -> None:
        """A scheduler is there: the first, or one in the place of a dead one."""
        self._scheduler_starts += 1
        self._scheduler_pid = pid
        self._roster.instances.introduce_scheduler(SCHEDULER, address)
        self._on_change()

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
                if self._count() >= self._max_instances:
                    logger.debug("no further %s instance: %d are all there may be", role, self._max_instances)
                elif self._loop.time() < self._retry_at:
                    logger.debug("no further %s instance yet: the last one did not start", role)
                else:
                    self._tasks.start(self._bring_up(self._new(role, reason), role))
            case StopInstance(instance_id=instance_id, reason=reason):
                if instance_id not in self._by_hand:
                    self._stop_when_empty(instance_id, reason, EMPTY_S)

    def _decided(self, line: str) -> None:
        logger.info("%s", line)
        self._decisions.append((self._loop.time(), line))
        self._on_change()

    # ---- starting

    @property
    def _coming(self) -> dict[str, str]:
        """Roles of the instances that are not in the roster yet."""
        return {name: role for name, role in self._starting.items() if name not in self._roster.instances}

    def _count(self) -> int:
        return len(list(self._roster.instances)) + len(self._coming)

    def _new(self, role: str, reason: str) -> str:
        """The id of one more instance. Ids are not used again: somebody may still speak of the former one."""
        number = self._next_numbers.get(role, 0)
        self._next_numbers[role] = number + 1
        name = f"{role}-{number}"
        self._starting[name] = role
        self._decided(f"{name} is started: {reason}")
        self._tell_starting()
        return name

    async def fill(self, names: list[tuple[str, str]]) -> None:
        """Starts the first instances, by id and role. Returns when all are there or wait for resources, and
        those that are there can serve. Raises: PdServeError: one does not start."""
        starts = {}
        for name, role in names:
            self._starting[name] = role
            starts[asyncio.ensure_future(self._start_first(name))] = role
        try:
            while starts and not (all(map(self._waits_for, self._coming)) and self._serves()):
                done, _ = await asyncio.wait(starts, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for start in done:
                    start.result()
                    del starts[start]
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        for start, role in starts.items():
            self._tasks.start(self._start_late(start, role))

    async def _start_first(self, name: str) -> None:
        """As `_bring_up`, but whoever starts the service is told of a failure."""
        try:
            async with asyncio.timeout(START_S):
                info = await self._start(name, self._starting[name])
        except TimeoutError as error:
            why = self._waits_for(name) or f"not ready after {START_S:.0f} s"
            raise EngineDeadError(f"{name} has not started: {why}") from error
        finally:
            del self._starting[name]
        self._joined(info)

    async def _start_late(self, start: "asyncio.Future[None]", role: str) -> None:
        try:
            await start
        except PdServeError as error:
            self._decided(str(error))
            self._failed()
            self.owe(role, "there were no resources for it at the start")
        finally:
            start.cancel()

    def _serves(self) -> bool:
        roles = {info.role for info in self._roster.instances}
        return "neutral" in roles or {"prefill", "decode"} <= roles

    def _joined(self, info: InstanceInfo) -> None:
        self._ready_at[info.instance_id] = self._loop.time()
        self._roster.join(info)
        self._on_change()

    def notes(self) -> dict[str, Any]:
        """What the next owner has to know, and cannot see."""
        return {
            "wanted": dict(self._wanted),
            "next": dict(self._next_numbers),
            "by_hand": sorted(self._by_hand),
        }

    def take_over(self, infos: list[InstanceInfo], notes: dict[str, Any]) -> None:
        """Goes on where the last owner has stopped, with the instances that it has left."""
        self._wanted, self._next_numbers = dict(notes["wanted"]), dict(notes["next"])
        self._by_hand = set(notes["by_hand"])
        for info in infos:
            self._joined(info)
        there = Counter(info.role for info in infos)
        for role, size in self._wanted.items():
            for _ in range(size - there[role]):
                self.owe(role, "missing after the restart of its owner")

    def owe(self, role: str, reason: str) -> None:
        """One more instance of this role, tried again and again until it is there."""
        self._owed.append((role, reason))
        self._owing.set()

    async def _pay(self) -> None:
        while True:
            await self._owing.wait()
            await asyncio.sleep(max(0.0, self._retry_at - self._loop.time()))
            self._owing.clear()
            owed, self._owed = self._owed, []
            for role, reason in owed:
                self._tasks.start(self._bring_up_owed(role, reason))

    async def _bring_up_owed(self, role: str, reason: str) -> None:
        if not await self._bring_up(self._new(role, reason), role):
            self.owe(role, reason)

    async def _bring_up(self, name: str, role: str) -> bool:
        """Starts it; returns whether it is there."""
        try:
            async with asyncio.timeout(START_S):
                self._joined(await self._start(name, role))
                # Counted as coming until it reports: in between a scheduler would miss it, and ask again.
                while name in self._roster.instances and self._roster.load_of(name) is None:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except (PdServeError, TimeoutError) as error:
            why = str(error) or self._waits_for(name) or f"not ready after {START_S:.0f} s"
            self._decided(f"{name} has not started: {why}")
            self._failed()
            return False
        else:
            self._retry_s = RETRY_S
            self._scaled["start", role] += 1
            return True
        finally:
            del self._starting[name]
            self._tell_starting()

    def _failed(self) -> None:
        self._retry_at = self._loop.time() + self._retry_s
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _tell_starting(self) -> None:
        self._roster.instances.starting = Counter(self._starting.values())
        self._roster.instances.greet()
        self._on_change()

    # ---- stopping

    @property
    def leaving(self) -> set[str]:
        """Instances that are stopped as soon as they are empty."""
        return set(self._stopping)

    def lost(self, instance_id: str) -> None:
        """Its process has died."""
        if instance_id not in self._roster.instances:
            return
        load = self._roster.load_of(instance_id)
        role = load.role if load is not None else self._roster.instances[instance_id].role
        self._roster.leave(instance_id)
        if self._loop.time() < self._ready_at.pop(instance_id, -math.inf) + LIFE_S:
            self._failed()
        if self._replaces and role not in self._autoscale and instance_id not in self._stopping:
            self.owe(role, f"in the place of {instance_id}, which has died")
        self._on_change()

    def _stop_when_empty(self, instance_id: str, reason: str, patience_s: float) -> None:
        if instance_id in self._roster.instances and instance_id not in self._stopping:
            self._stopping.add(instance_id)
            self._on_change()
            self._tasks.start(self._take_down(instance_id, reason, self._loop.time() + patience_s))

    async def _take_down(self, instance_id: str, reason: str, deadline: float) -> None:
        by_hand = instance_id in self._by_hand
        try:
            while True:
                await asyncio.sleep(POLL_S)
                load = self._roster.load_of(instance_id)
                if load is None or (instance_id not in self._by_hand if by_hand else not load.draining):
                    return  # it has died, or is needed again
                if self._loop.time() > deadline or (load.draining and self._roster.is_empty(instance_id)):
                    break
            self._roster.leave(instance_id)
            self._ready_at.pop(instance_id, None)
            self._on_change()
            await self._stop(instance_id)
            self._decided(f"{instance_id} is stopped: {reason}")
            self._scaled["stop", load.role] += 1
        finally:
            self._stopping.discard(instance_id)
            self._by_hand.discard(instance_id)
            self._on_change()

    # ---- by hand

    def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        """See `ClusterView`."""
        if instance_id not in self._roster.instances:
            raise UnknownTargetError(f"no instance {instance_id!r}; see GET /cluster")
        if draining and (why := self._roster.last_of_its_kind(instance_id)) is not None:
            raise MigrationRefusedError(why)
        self._drain(instance_id, draining, "asked for by hand")
        if draining and stop:
            self._wanted[self._roles()[instance_id]] -= 1
            self._stop_when_empty(instance_id, "drained by hand", math.inf)

    def _drain(self, instance_id: str, draining: bool, reason: str) -> None:
        if draining:
            self._by_hand.add(instance_id)
        else:
            self._by_hand.discard(instance_id)
        self._roster.instances.send(instance_id, SetDraining(draining, by_hand=True))
        self._decided(f"{instance_id} is {'drained' if draining else 'used again'}: {reason}")

    def size(self, role: str) -> int:
        """Instances of a role that are there to stay, on their way, or owed."""
        staying = [name for name, r in self._roles().items() if r == role and name not in self._stopping]
        return len(staying) + list(self._coming.values()).count(role) + [r for r, _ in self._owed].count(role)

    def _roles(self) -> dict[str, str]:
        """What each instance is used for now."""
        names = [info.instance_id for info in self._roster.instances]
        loads = {name: self._roster.load_of(name) for name in names}
        return {
            name: load.role if load else self._roster.instances[name].role for name, load in loads.items()
        }

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Gives pools another size: starts instances, or drains and stops the emptiest.

        Raises:
            InvalidRequestError: No such role, or the service could not serve with so few.
            MigrationRefusedError: The scheduler scales this pool, within other bounds.
        """
        after = {role: self.size(role) for role in self._next_numbers} | dict(sizes)
        if unknown := sorted(sizes.keys() - self._next_numbers.keys()):
            raise InvalidRequestError(f"no role {unknown[0]!r}; there are {', '.join(self._next_numbers)}")
        if min(after.values()) < 0:
            raise InvalidRequestError("the number of instances cannot be negative")
        if not after["prefill"] and not after["neutral"]:
            raise InvalidRequestError("no instance would take requests")
        if bool(after["prefill"]) != bool(after["decode"]):
            raise InvalidRequestError("prefill and decode instances need each other")
        for role, size in sizes.items():
            if (bounds := self._autoscale.get(role)) and not bounds.least <= size <= bounds.most:
                within = f"{bounds.least}:{bounds.most}"
                raise MigrationRefusedError(f"the scheduler scales {role} instances within {within}")
        for role, size in sizes.items():
            self._resize(role, size)

    def _resize(self, role: str, size: int) -> None:
        reason = f"{role}={size} asked for by hand"
        self._wanted[role] = size
        for _ in range(size - self.size(role)):
            self.owe(role, reason)
        for owed in [owed for owed in self._owed if owed[0] == role]:
            if self.size(role) > size:
                self._owed.remove(owed)
        roles = self._roles()
        candidates = [name for name in roles if roles[name] == role and name not in self._stopping]
        candidates.sort(key=self._requests_on)
        for name in candidates[: max(0, self.size(role) - size)]:
            self._drain(name, True, reason)
            self._stop_when_empty(name, reason, math.inf)

    def _requests_on(self, instance_id: str) -> int:
        load = self._roster.load_of(instance_id)
        return load.running + load.waiting if load else 0

    def restart(self) -> None:
        """Begins to put a new instance in the place of each, one after another; `state` shows how far it is.

        Raises:
            MigrationRefusedError: It is under way already.
        """
        if self._restart is not None and not self._restart.done():
            raise MigrationRefusedError(f"a restart is under way: {self._restarted}")
        self._restarted = "begins"
        self._restart = self._tasks.start(self._restart_all(self._roles()))

    async def _restart_all(self, roles: dict[str, str]) -> None:
        for done, (old, role) in enumerate(roles.items()):
            self._restarted = f"{done} of {len(roles)} done, now {old}"
            if old not in self._roster.instances:
                continue  # has died, and been replaced, or was stopped
            name = self._new(role, f"in the place of {old}, by a restart")
            if not await self._bring_up(name, role):
                self._restarted = f"given up after {done} of {len(roles)}: {name} has not started"
                self._decided(f"restart {self._restarted}")
                return
            self._drain(old, True, "by a restart")
            self._stop_when_empty(old, "by a restart", math.inf)
            while old in self._roster.instances:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        self._restarted = f"{len(roles)} of {len(roles)} done"
        self._decided(f"restart: {self._restarted}")

    def state(self) -> dict[str, Any]:
        """What `GET /cluster` shows beside the instances that are there."""
        now, heard_at = self._loop.time(), self._scheduler_heard_at
        return {
            "coming": [
                {"id": name, "role": role, "state": self._waits_for(name) or "starting"}
                for name, role in self._coming.items()
            ]
            + [{"id": "", "role": role, "state": f"to be started: {reason}"} for role, reason in self._owed],
            "scheduler": {
                "state": "alive" if heard_at is not None and now - heard_at < SCHEDULER_LEASE_S else "absent",
                "policy": self._policy,
                "pid": self._scheduler_pid,
                "restarts": max(0, self._scheduler_starts - 1),
            },
            "scaled": [
                {"action": action, "role": role, "instances": number}
                for (action, role), number in self._scaled.items()
            ],
            "decisions": [
                {"seconds_ago": round(now - at, 1), "what": line} for at, line in reversed(self._decisions)
            ],
            "restart": {
                "running": self._restart is not None and not self._restart.done(),
                "progress": self._restarted,
            },
        }
