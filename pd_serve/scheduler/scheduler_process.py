"""The global scheduler as a process: load reports to `router.scheduler`, its decisions to instances.

It sees instances, never requests, and has no state that a new scheduler would lack: membership comes from the
manager, loads from the instances. It may die at any time. Requests stay where they are until the next
scheduler has all reports.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import SchedulerStats
from pd_serve.comm.leases import OrphanTimer
from pd_serve.comm.membership import MANAGER, SCHEDULER, Membership, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import (
    Decision,
    Heartbeat,
    LoadReport,
    MoveOut,
    SchedulerReport,
    SetDraining,
    SetRole,
    StartInstance,
    StopInstance,
    ToScheduler,
)
from pd_serve.comm.timing import FIRST_REPORTS_S, HEARTBEAT_S
from pd_serve.comm.wire import CurveKeys
from pd_serve.observe.process_stats import process_stats
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import Demand
from router.scaling import PoolBounds
from router.scheduler import Scheduler
from router.settings import PolicySet


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Configuration of a scheduler. Plain values: Ray serializes it.

    Attributes:
        autoscale: Bounds by role; a role without bounds is not scaled.
    """

    policies: PolicySet
    autoscale: dict[str, PoolBounds]
    host: str
    keys: CurveKeys


class SchedulerProcess:
    """Implements `router.scheduler.SchedulerActions` with messages. Runs on one event loop until `close`.

    Args:
        policies: From `router.policies.policy_set`.
        autoscale: Bounds by role, for the pools whose size may change.
        on_failure: Called when the scheduler's loop has failed. It has to end the process.
    """

    def __init__(
        self,
        wire: MessageWire,
        policies: PolicySet,
        *,
        autoscale: Mapping[str, PoolBounds] | None = None,
        seed: int = 0,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._wire = wire
        self._tasks = BackgroundTasks(on_failure)
        self._members = MembershipView(SCHEDULER, wire)
        self._waiting: dict[str, Demand] = {}
        #: Requested instances that are not in `Membership.starting` yet, by role.
        self._requested: Counter[str] = Counter()
        self._unreported: set[str] = set()
        self._has_members = asyncio.Event()
        self._all_reported = asyncio.Event()
        self._roles: dict[str, str] = {}  # as last reported
        self._moves = Counter(dict.fromkeys(("balance", "defragment", "drain"), 0))
        self._scaling = Counter(dict.fromkeys(("start", "stop", "drain", "use_again", "set_role"), 0))
        self._orphan_timer = OrphanTimer("the scheduler")
        self.scheduler = Scheduler(policies, self, autoscale=autoscale, rng=random.Random(seed))
        self.address = wire.listen(ToScheduler, self._on_message, gathers=True)
        self._tasks.start(self._decide())
        self._tasks.start(self._heartbeat())

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def starting(self) -> Counter[str]:
        """Number of requested and starting instances, and of members that do not report now, by role.

        A silent instance serves again, or the manager replaces it: nothing is started in its place here.
        """
        latest = self._members.latest
        members = self._members.instances.items()
        silent = [self._roles.get(name, info.role) for name, info in members if name not in self.scheduler]
        return self._requested + Counter(latest.starting if latest is not None else {}) + Counter(silent)

    @property
    def waiting(self) -> Demand:
        """Demand of the waiting lines of all API servers."""
        demands = self._waiting.values()
        return Demand(sum(demand.requests for demand in demands), sum(demand.tokens for demand in demands))

    # ---- messages

    def _on_message(self, sender: str, message: Any, payload: Sequence[bytes]) -> None:
        match message:
            case LoadReport(load=load):
                if sender in self._members.instances:
                    self.scheduler.report(load)
                    self._roles[sender] = load.role
                    self._reported(sender)
            case Heartbeat(waiting=waiting):
                self._orphan_timer.on_message()
                if sender in self._members.api_servers:
                    self._waiting[sender] = waiting
            case Membership():
                self._on_membership(message)

    def _on_membership(self, message: Membership) -> None:
        is_first = self._members.latest is None
        change = self._members.update(message)
        if change is None:
            return
        self._orphan_timer.on_message()
        self._requested.clear()
        for api_server in change.api_servers_left:
            self._waiting.pop(api_server, None)
        for instance_id in change.left:
            self.scheduler.remove(instance_id)
            self._roles.pop(instance_id, None)
            self._reported(instance_id)
        self._unreported.update(info.instance_id for info in change.joined)
        self._has_members.set()
        if not self._unreported:
            self._all_reported.set()
        if is_first:
            self._report()

    def _reported(self, instance_id: str) -> None:
        self._unreported.discard(instance_id)
        if not self._unreported:
            self._all_reported.set()

    async def _decide(self) -> None:
        """Runs the scheduler when it has the membership, and all instances have reported or take too long."""
        await self._has_members.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REPORTS_S):
                await self._all_reported.wait()
        await self.scheduler.run()

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._report(stats=self.stats())
            self._orphan_timer.on_heartbeat(HEARTBEAT_S)

    # ---- SchedulerActions

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None:
        self._moves[reason] += 1
        self._wire.send(source, MoveOut(destination, reason, selection))

    def set_role(self, instance_id: str, role: str, reason: str) -> None:
        self._scaling["set_role"] += 1
        self._wire.send(instance_id, SetRole(role))
        self._report(Decision(instance_id, f"becomes {role}", reason))

    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None:
        self._scaling["drain" if draining else "use_again"] += 1
        self._wire.send(instance_id, SetDraining(draining))
        self._report(Decision(instance_id, "is drained" if draining else "is used again", reason))

    def start(self, role: str, reason: str) -> None:
        self._scaling["start"] += 1
        self._requested[role] += 1
        self._wire.send(MANAGER, StartInstance(role, reason))

    def stop(self, instance_id: str, reason: str) -> None:
        self._scaling["stop"] += 1
        self._wire.send(MANAGER, StopInstance(instance_id, reason))

    def stats(self) -> SchedulerStats:
        """For metrics."""
        reporting = len(self._members.instances) - len(self._unreported)
        problems = self._wire.failures.problems()
        return SchedulerStats(
            process_stats(),
            reporting,
            dict(self._moves),
            dict(self._scaling),
            problems,
            dict(self._wire.failures.by_kind),
        )

    def _report(self, *decisions: Decision, stats: SchedulerStats | None = None) -> None:
        self._wire.send(MANAGER, SchedulerReport(list(decisions), stats))
