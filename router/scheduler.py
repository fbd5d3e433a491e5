"""The global scheduler: moves of requests between instances, and the size and roles of the pools.

It sees instances, never requests. Its state comes with the next reports: it can be killed and started again
at any time.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec.structs import replace

from router.freeness import limit_headroom
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.projected_loads import ProjectedLoads
from router.request import Demand
from router.rescheduling import RESCHEDULING
from router.scaling import Decision, Drain, PoolBounds, PoolScaler, Start, Stop, to_hand_off
from router.scaling.role_switch import RoleSwitch
from router.settings import PolicySet

logger = logging.getLogger(__name__)

#: Greatest time between two rounds, also without reports.
TICK_S = 1.0


class SchedulerActions(Protocol):
    """Carries out decisions, without an answer: the effect is in later reports."""

    @property
    def starting(self) -> Mapping[str, int]:
        """Instances that were asked for and do not report yet, or not any more, by role."""
        ...

    @property
    def waiting(self) -> Demand:
        """Requests that wait at the API servers for an instance with room."""
        ...

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None: ...
    def set_role(self, instance_id: str, role: str, reason: str) -> None: ...
    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None: ...
    def start(self, role: str, reason: str) -> None: ...
    def stop(self, instance_id: str, reason: str) -> None: ...


class Scheduler:
    """Decides in rounds, by the policies of a set.

    Args:
        autoscale: Bounds by role, for the pools whose size may change.
        rng: Breaks ties between instances that are equally free.
        clock: Seconds; by default the running event loop's.
    """

    def __init__(
        self,
        policies: PolicySet,
        actions: SchedulerActions,
        *,
        autoscale: Mapping[str, PoolBounds] | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.policies = policies
        self._actions = actions
        self._rng = rng or random.Random(0)
        self._clock = clock or asyncio.get_running_loop().time
        self._rescheduling = RESCHEDULING.make(policies.choice("rescheduling"))
        self._scalers = {
            role: PoolScaler(role, bounds, policies) for role, bounds in (autoscale or {}).items()
        }
        self._role_switch = RoleSwitch(policies, autoscale or {}) if policies.roles else None
        self._loads = ProjectedLoads(self._clock, policies.max_report_age_s)
        self._reported = asyncio.Event()

    def report(self, load: InstanceLoad) -> None:
        """Takes the latest load of an instance. An instance takes part from its first report on."""
        # On a decode instance only preempted requests wait. Making room for them fills up the others.
        if load.waiting and (load.role == "decode" or not self.policies.defragment):
            load = replace(load, head_of_line_blocks=0, preempted=0)
        self._loads.report(load)
        self._reported.set()

    def remove(self, instance_id: str) -> None:
        """Forgets an instance that is gone. Unknown instances are ignored."""
        self._loads.remove(instance_id)

    def __contains__(self, instance_id: object) -> bool:
        """Whether an instance takes part: it reports."""
        return instance_id in self._loads

    async def run(self) -> None:
        """Decides after each report, at most once per `rescheduling_interval_s`, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._reported.wait()
            except TimeoutError:
                pass
            self._reported.clear()
            self.decide(self._clock())
            await asyncio.sleep(self.policies.rescheduling_interval_s)

    def decide(self, now: float) -> None:
        """One round."""
        self._forget_silent()
        loads = limit_headroom(self._loads.all(), self.policies.headroom)
        self._rng.shuffle(loads)
        for move in self._rescheduling.moves(loads, self.policies):
            self._loads.add_move(move.source, move.destination.instance_id, move.num_blocks)
            self._actions.move(move.source, move.destination, move.reason, move.selection)
        if self._role_switch is not None:
            self._switch_roles(self._role_switch, loads, now)
        for role, scaler in self._scalers.items():
            pool = [load for load in loads if load.role == role]
            waiting = to_hand_off(loads) if role == "decode" else self._actions.waiting
            for decision in scaler.decide(pool, self._actions.starting.get(role, 0), now, waiting):
                self._carry_out(decision)

    def _forget_silent(self) -> None:
        """An instance that stops reporting takes no part until it reports again."""
        for name, age in self._loads.silent().items():
            logger.warning("%s has not reported for %.1f s", name, age)
            self.remove(name)

    def _switch_roles(self, role_switch: RoleSwitch, loads: list[InstanceLoad], now: float) -> None:
        for decision in role_switch.decide(loads, now):
            if isinstance(decision, Drain):
                self._carry_out(decision)
                continue
            logger.debug("%s becomes %s: %s", decision.instance_id, decision.role, decision.reason)
            self._actions.set_role(decision.instance_id, decision.role, decision.reason)
            for scaler in self._scalers.values():
                scaler.postpone(now)

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Start(role=role, reason=reason):
                logger.debug("one more %s instance: %s", role, reason)
                self._actions.start(role, reason)
            case Drain(instance_id=instance_id, reason=reason, draining=draining):
                logger.debug("%s %s: %s", instance_id, "drains" if draining else "is used again", reason)
                self._actions.set_draining(instance_id, draining, reason)
            case Stop(instance_id=instance_id, reason=reason):
                logger.debug("%s is stopped: %s", instance_id, reason)
                self._actions.stop(instance_id, reason)
