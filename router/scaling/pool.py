"""The size of one pool: a signal, held within bounds and kept from swinging."""

import math
from collections.abc import Sequence

from router.load import InstanceLoad
from router.plugins import PolicyKind
from router.request import NO_DEMAND, Demand
from router.scaling.decisions import Decision, Drain, PoolBounds, ScalingPolicy, SizeChange, Start, Stop
from router.scaling.signals import BacklogSignal, BusySignal, FreenessSignal, WorkSignal
from router.scaling.trend import LoadTrend, grown
from router.settings import PolicySet

#: Time that a drained instance stays empty before it is stopped: requests may have been on their way to it.
EMPTY_S = 1.0

#: Time after which an order to drain or stop without effect is repeated.
ASK_AGAIN_S = 60.0

#: Time that a drain by another party, such as an operator, holds up changes of the pool. It may last.
OTHERS_DRAIN_S = 60.0

SCALING: PolicyKind[ScalingPolicy] = PolicyKind(
    "scaling",
    "look",
    {"freeness": FreenessSignal, "backlog": BacklogSignal, "busy": BusySignal, "work": WorkSignal},
)


def signal_of(role: str, policies: PolicySet) -> ScalingPolicy:
    """The scaling policy of a pool."""
    return SCALING.make(policies.choice("prefill_scaling" if role == "prefill" else "scaling"))


class PoolScaler:
    """Decides on the size of one pool. Its memory only delays decisions: a new scaler decides the same.

    One change at a time: nothing is drained while an instance starts or drains, and changes are
    `scale_interval_s` apart. A drain by another party holds that up for `OTHERS_DRAIN_S` only. A draining
    instance is used again before a new one is started, but for those that an operator drains. While too few
    instances serve, none is stopped, whatever is being started: that may fail.
    """

    def __init__(self, role: str, bounds: PoolBounds, policies: PolicySet) -> None:
        self.role = role
        self._bounds = bounds
        self._policies = policies
        self._signal = signal_of(role, policies)
        self._trend = LoadTrend()
        self._next_look = math.inf  # known from the first look on
        self._too_large_since: float | None = None
        self._known: dict[str, None] | None = None
        self._empty_since: dict[str, float] = {}
        self._used_again: dict[str, float] = {}  # still draining: the order was lost, or another party drains
        self._stopped: dict[str, float] = {}
        self._drained: dict[str, float] = {}  # by this scaler
        self._draining_since: dict[str, float] = {}

    def decide(
        self, loads: Sequence[InstanceLoad], starting: int, now: float, waiting: Demand = NO_DEMAND
    ) -> list[Decision]:
        """The decisions of this round.

        Args:
            starting: Instances on their way, not among `loads`.
            waiting: Requests for this pool that it does not have yet.
        """
        serving = [load for load in loads if not load.draining]
        draining = [load for load in loads if load.draining]
        self._remember(loads, now)
        self._trend.add(loads, now, waiting)
        decisions: list[Decision] = []
        if len(serving) >= self._bounds.least:
            decisions = self._stops(draining, now)
        else:
            self._stopped.clear()  # those that are still there can be used again
        needed = self._needed(serving, starting, waiting)
        if needed.instances >= 0:
            self._too_large_since = None
        elif self._too_large_since is None:
            self._too_large_since = now
        if now >= self._next_look:
            self._next_look = now + self._policies.scale_interval_s
            decisions += self._resize(serving, draining, starting, needed, now)
        return decisions

    def _needed(self, serving: Sequence[InstanceLoad], starting: int, waiting: Demand) -> SizeChange:
        """By the pool's signal. A pool without instances has nothing to measure: it waits for the first."""
        if serving:
            growth = self._trend.growth(self._policies.forecast_s) if self._policies.forecast_s else 1.0
            expected = [grown(load, growth) for load in serving]
            waiting = waiting._replace(blocks=round(waiting.blocks * growth))
            return self._signal.look(expected, starting, self._policies, waiting)
        missing = 1 if waiting.requests and not starting else 0
        return SizeChange(missing, "no instance serves, and requests wait" if missing else "none reports yet")

    def postpone(self, now: float) -> None:
        """Waits for the effect of another change of the pool."""
        self._next_look = now + self._policies.scale_interval_s

    def _remember(self, loads: Sequence[InstanceLoad], now: float) -> None:
        names = {load.instance_id: None for load in loads}
        if self._known is None or any(name not in self._known for name in names):
            self.postpone(now)
        self._known = names
        still_empty = [load for load in loads if load.draining and load.is_empty]
        self._empty_since = {
            load.instance_id: self._empty_since.get(load.instance_id, now) for load in still_empty
        }
        drains = {load.instance_id for load in loads if load.draining}
        self._draining_since = {name: self._draining_since.get(name, now) for name in drains}
        self._drained = {
            name: at for name, at in self._drained.items() if name in drains or now - at < ASK_AGAIN_S
        }
        self._stopped, self._used_again = (
            {name: at for name, at in ordered.items() if name in drains and now - at < ASK_AGAIN_S}
            for ordered in (self._stopped, self._used_again)
        )

    def _stops(self, draining: Sequence[InstanceLoad], now: float) -> list[Decision]:
        stops: list[Decision] = []
        for load in draining:
            name = load.instance_id
            is_empty = now - self._empty_since.get(name, now) >= EMPTY_S
            if is_empty and name not in self._stopped and not load.drained_by_operator:
                self._stopped[name] = now
                stops.append(Stop(name, "drained and empty"))
        return stops

    def _resize(
        self,
        serving: Sequence[InstanceLoad],
        draining: Sequence[InstanceLoad],
        starting: int,
        needed: SizeChange,
        now: float,
    ) -> list[Decision]:
        count = len(serving) + starting
        least, most = self._bounds
        missing = least - len(serving)
        more = min(max(needed.instances, least - count), most - count)
        if missing > 0 or more > 0:
            reason = f"{len(serving)} of at least {least}" if missing > 0 else needed.reason
            used_again = self._use_again(max(missing, more), reason, draining, now)
            return used_again + [Start(self.role, reason)] * (more - len(used_again))
        if len(serving) > most:
            return self._drain(serving, 1, f"{len(serving)} of at most {most}", now)
        long_enough = (
            self._too_large_since is not None and now - self._too_large_since >= self._policies.drain_after_s
        )
        changes = starting or any(self._is_leaving(load.instance_id, now) for load in draining)
        if needed.instances < 0 and long_enough and count > least and not changes:
            return self._drain(serving, min(-needed.instances, count - least), needed.reason, now)
        return []

    def _is_leaving(self, draining: str, now: float) -> bool:
        """Whether a drain is expected to end with the instance's stop."""
        return draining in self._drained or now - self._draining_since[draining] < OTHERS_DRAIN_S

    def _use_again(
        self, number: int, reason: str, draining: Sequence[InstanceLoad], now: float
    ) -> list[Decision]:
        """Uses draining instances again, the fullest first."""
        ordered = self._used_again.keys() | self._stopped.keys()
        usable = [
            load for load in draining if not load.drained_by_operator and load.instance_id not in ordered
        ]
        usable.sort(key=lambda load: (-load.running, load.instance_id))
        for load in usable[:number]:
            self._used_again[load.instance_id] = now
            self._drained.pop(load.instance_id, None)
        return [Drain(load.instance_id, reason, draining=False) for load in usable[:number]]

    def _drain(self, serving: Sequence[InstanceLoad], number: int, reason: str, now: float) -> list[Decision]:
        """Drains the emptiest instances, if possible none with requests of high priority."""
        emptiest = sorted(serving, key=_to_empty)[:number]
        self._drained |= {load.instance_id: now for load in emptiest}
        return [Drain(load.instance_id, reason) for load in emptiest]


def _to_empty(load: InstanceLoad) -> tuple[bool, int, int, str]:
    """The order in which instances are drained: by the blocks that have to move."""
    return load.high_priority > 0, load.demanded_blocks, load.running + load.waiting, load.instance_id
