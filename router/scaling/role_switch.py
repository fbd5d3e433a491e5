"""Which instance changes sides when prefill and decode are in the wrong ratio."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from router.load import InstanceLoad
from router.policies import PolicySet
from router.scaling import Drain, PoolBounds
from router.scaling.backlog_signal import by_backlog
from router.scaling.freeness_signal import by_freeness


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """This instance serves the other pool from now on."""

    instance_id: str
    role: str
    reason: str


class RoleSwitch:
    """An instance changes sides when one pool would grow while the other would shrink, by the signals that
    size them, and has for `scale_interval_s`. An idle one does at once; where none is, one is drained first.

    What makes it swing back is the reverse: the distance between growing and shrinking is the hysteresis.
    A pool is never emptied.

    Args:
        bounds: Of the pools that have any.
    """

    def __init__(self, policies: PolicySet, bounds: Mapping[str, PoolBounds]) -> None:
        self._policies = policies
        self._bounds = bounds
        self._donor = ""
        self._since = 0.0
        self._wanted_at = 0.0
        self._lending = ""  # drained to change sides

    def decide(self, loads: Iterable[InstanceLoad], now: float) -> list[SwitchRole | Drain]:
        pools: dict[str, list[InstanceLoad]] = {"prefill": [], "decode": []}
        for load in sorted(loads, key=lambda load: load.instance_id):
            if load.role in pools:
                pools[load.role].append(load)
        donor, reason = self._donor_wanted(pools)
        if donor and donor != self._donor:
            self._donor, self._since = donor, now
        if donor:
            self._wanted_at = now
        elif now - self._wanted_at >= self._policies.scale_interval_s:
            self._donor = ""
            return self._take_back(pools)
        if not donor or now - self._since < self._policies.scale_interval_s:
            return []
        return self._exchange(pools[donor], "decode" if donor == "prefill" else "prefill", reason)

    def _donor_wanted(self, pools: Mapping[str, Sequence[InstanceLoad]]) -> tuple[str, str]:
        """The pool that should give an instance to the other, and why; empty for none."""
        serving = {role: self._serving(pool) for role, pool in pools.items()}
        if not all(serving.values()):
            return "", ""
        prefill = by_backlog(serving["prefill"], 0, self._policies)
        decode = by_freeness(serving["decode"], 0, self._policies)
        reason = f"prefill: {prefill.reason}; decode: {decode.reason}"
        if prefill.change > 0 > decode.change and self._may_change("decode", "prefill", serving):
            return "decode", reason
        if decode.change > 0 > prefill.change and self._may_change("prefill", "decode", serving):
            return "prefill", reason
        return "", ""

    def _serving(self, pool: Sequence[InstanceLoad]) -> list[InstanceLoad]:
        """What takes requests; the one that is drained to change sides has not changed yet."""
        back = [replace(load, draining=False) if load.instance_id == self._lending else load for load in pool]
        return [load for load in back if not load.draining]

    def _may_change(self, donor: str, taker: str, serving: Mapping[str, Sequence[InstanceLoad]]) -> bool:
        least = self._bounds[donor].least if donor in self._bounds else 1
        enough = len(serving[donor]) > max(least, 1)
        return enough and (taker not in self._bounds or len(serving[taker]) < self._bounds[taker].most)

    def _exchange(self, pool: Sequence[InstanceLoad], role: str, reason: str) -> list[SwitchRole | Drain]:
        empty = [load for load in pool if load.is_empty]
        # What is drained by somebody else is not ours to use, unless that was the scaling of this pool.
        scaled = bool(pool) and pool[0].role in self._bounds
        drained = [load for load in empty if load.draining and (scaled or load.instance_id == self._lending)]
        for load in drained or [load for load in empty if not load.draining]:
            self._donor = self._lending = ""
            back: list[SwitchRole | Drain] = [Drain(load.instance_id, reason, draining=False)]
            return [SwitchRole(load.instance_id, role, reason), *(back if load.draining else [])]
        if any(load.draining for load in pool):
            return []
        last = min(pool, key=lambda load: (load.running + load.waiting, load.instance_id))
        self._lending = last.instance_id
        return [Drain(last.instance_id, f"to become {role}: {reason}")]

    def _take_back(self, pools: Mapping[str, Sequence[InstanceLoad]]) -> list[SwitchRole | Drain]:
        lending, self._lending = self._lending, ""
        if any(load.instance_id == lending and load.draining for pool in pools.values() for load in pool):
            return [Drain(lending, "both pools are large enough", draining=False)]
        return []
