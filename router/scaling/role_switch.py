"""Changes of an instance's role when prefill and decode pools are in the wrong ratio."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from router.load import InstanceLoad
from router.request import NO_DEMAND
from router.scaling.decisions import Drain, PoolBounds
from router.scaling.pool import signal_of
from router.scaling.signals import to_hand_off
from router.settings import PolicySet

ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """Change the role of an instance."""

    instance_id: str
    role: str
    reason: str


class RoleSwitch:
    """Gives an instance of one pool to the other.

    An instance changes its role when, for `scale_interval_s`, one pool would grow while the other would
    shrink, by the scaling policies of the two. An idle instance changes at once; if none is idle, one is
    drained first. The distance between growing and shrinking is the hysteresis. A pool is never emptied.

    Args:
        bounds: By role, for the pools that have bounds.
    """

    def __init__(self, policies: PolicySet, bounds: Mapping[str, PoolBounds]) -> None:
        self._policies = policies
        self._bounds = bounds
        self._signals = {role: signal_of(role, policies) for role in ROLES}
        self._donor = ""  # pool that gives, since `_since`, last seen as such at `_needed_at`
        self._since = 0.0
        self._needed_at = 0.0
        self._draining_to_switch = ""

    def decide(self, loads: Iterable[InstanceLoad], now: float) -> list[SwitchRole | Drain]:
        pools: dict[str, list[InstanceLoad]] = {role: [] for role in ROLES}
        for load in sorted(loads, key=lambda load: load.instance_id):
            if load.role in pools:
                pools[load.role].append(load)
        donor, reason = self._needed_donor(pools)
        if donor and donor != self._donor:
            self._donor, self._since = donor, now
        if donor:
            self._needed_at = now
        elif now - self._needed_at >= self._policies.scale_interval_s:
            self._donor = ""
            return self._use_again(pools)
        if not donor or now - self._since < self._policies.scale_interval_s:
            return []
        return self._switch(pools[donor], "decode" if donor == "prefill" else "prefill", reason)

    def _needed_donor(self, pools: Mapping[str, Sequence[InstanceLoad]]) -> tuple[str, str]:
        """The pool that should give an instance to the other, and why; empty for none."""
        serving = {role: self._serving(pool) for role, pool in pools.items()}
        if not all(serving.values()):
            return "", ""
        waiting = {"prefill": NO_DEMAND, "decode": to_hand_off(pools["prefill"])}
        prefill, decode = (
            self._signals[role].look(serving[role], 0, self._policies, waiting[role]) for role in ROLES
        )
        reason = f"prefill: {prefill.reason}; decode: {decode.reason}"
        if prefill.instances > 0 > decode.instances and self._may_give("decode", "prefill", serving):
            return "decode", reason
        if decode.instances > 0 > prefill.instances and self._may_give("prefill", "decode", serving):
            return "prefill", reason
        return "", ""

    def _serving(self, pool: Sequence[InstanceLoad]) -> list[InstanceLoad]:
        """Instances that take requests. One that is drained to switch counts until it has switched."""
        counted = [
            replace(load, draining=False) if load.instance_id == self._draining_to_switch else load
            for load in pool
        ]
        return [load for load in counted if not load.draining]

    def _may_give(self, donor: str, taker: str, serving: Mapping[str, Sequence[InstanceLoad]]) -> bool:
        """Whether the bounds of both pools allow it."""
        least = self._bounds[donor].least if donor in self._bounds else 1
        enough = len(serving[donor]) > max(least, 1)
        return enough and (taker not in self._bounds or len(serving[taker]) < self._bounds[taker].most)

    def _switch(self, pool: Sequence[InstanceLoad], role: str, reason: str) -> list[SwitchRole | Drain]:
        empty = [load for load in pool if load.is_empty]
        # An instance that an operator drains is not ours to use; one that the pool's scaler drains is.
        scaled = bool(pool) and pool[0].role in self._bounds
        ours = {load.instance_id for load in empty if scaled} | {self._draining_to_switch}
        drained = [load for load in empty if load.draining and load.instance_id in ours]
        for load in drained or [load for load in empty if not load.draining]:
            self._donor = self._draining_to_switch = ""
            back: list[SwitchRole | Drain] = [Drain(load.instance_id, reason, draining=False)]
            return [SwitchRole(load.instance_id, role, reason), *(back if load.draining else [])]
        if any(load.draining for load in pool):
            return []
        last = min(pool, key=lambda load: (load.running + load.waiting, load.instance_id))
        self._draining_to_switch = last.instance_id
        return [Drain(last.instance_id, f"to become {role}: {reason}")]

    def _use_again(self, pools: Mapping[str, Sequence[InstanceLoad]]) -> list[SwitchRole | Drain]:
        drained, self._draining_to_switch = self._draining_to_switch, ""
        if any(load.instance_id == drained and load.draining for pool in pools.values() for load in pool):
            return [Drain(drained, "both pools are large enough", draining=False)]
        return []
