"""Which faults a run has: drawn from a seed, so that a run can be repeated."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Target(StrEnum):
    """The kind of process that a fault affects."""

    PREFILL = "prefill"
    DECODE = "decode"
    NEUTRAL = "neutral"
    SCHEDULER = "scheduler"
    MANAGER = "manager"
    API_SERVER = "api server"
    RAYLET = "raylet"

    @property
    def is_instance(self) -> bool:
        return self in (Target.PREFILL, Target.DECODE, Target.NEUTRAL)


class Operation(StrEnum):
    """What an operator does to the cluster right before a fault."""

    DRAIN = "drain"
    SCALE = "scale"
    RESTART = "restart"
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        pause_s: Time since the last fault.
        targets: Kinds of the affected processes; two are affected at once.
        freeze_s: Seconds between SIGSTOP and SIGCONT; None for SIGKILL.
        during: Operation that begins `lead_s` seconds before the fault.
        dice: Seed of the choice among the processes of a kind.
    """

    number: int
    pause_s: float
    targets: tuple[Target, ...]
    freeze_s: float | None
    during: Operation | None
    lead_s: float
    dice: int

    def __str__(self) -> str:
        how = "kill" if self.freeze_s is None else f"freeze {self.freeze_s:.1f} s"
        during = f", during {self.during}" if self.during else ""
        return f"{how} {' and '.join(self.targets)}{during}"


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How often which fault is drawn.

    Attributes:
        kill, freeze: Weight of each kind of process among kills and among freezes.
        longest_freeze_s: By kind; `DEFAULT_FREEZE_S` for others.
        numbers: Processes of a kind, if there are several: no fault affects more.
    """

    kill: Mapping[Target, float]
    freeze: Mapping[Target, float]
    longest_freeze_s: Mapping[Target, float]
    numbers: Mapping[Target, int] = field(default_factory=dict)


#: Share of faults that are freezes, that affect two processes, and that occur during each operation.
FREEZE_SHARE = 0.3
TWO_SHARE = 0.15
OPERATION_SHARES = {
    Operation.DRAIN: 0.12,
    Operation.SCALE: 0.12,
    Operation.RESTART: 0.02,
    Operation.MOVE: 0.14,
}

#: Freezes are drawn log-uniformly up to a maximum: short ones are bridged, longer ones exceed leases.
SHORTEST_FREEZE_S, DEFAULT_FREEZE_S = 0.1, 40.0


def draw(seed: int, count: int, duration_s: float, rates: FaultRates) -> list[Fault]:
    """The faults of a run, in order. The same arguments give the same faults.

    Args:
        duration_s: Sum of the pauses.
    """
    dice = random.Random(f"faults {seed}")
    pauses = [dice.expovariate(1.0) + 0.2 for _ in range(count)]
    scale = duration_s / sum(pauses) if pauses else 0.0
    return [_fault(dice, number, pause * scale, rates) for number, pause in enumerate(pauses)]


def _fault(dice: random.Random, number: int, pause_s: float, rates: FaultRates) -> Fault:
    is_freeze = dice.random() < FREEZE_SHARE
    weights = rates.freeze if is_freeze else rates.kill
    is_double = dice.random() < TWO_SHARE
    targets = tuple(dice.choices(list(weights), list(weights.values())))
    others = {
        one: weight for one, weight in weights.items() if [*targets].count(one) < rates.numbers.get(one, 1)
    }
    if is_double and others:
        targets += tuple(dice.choices(list(others), list(others.values())))
    freeze_s = None
    if is_freeze:
        longest = min(rates.longest_freeze_s.get(target, DEFAULT_FREEZE_S) for target in targets)
        freeze_s = SHORTEST_FREEZE_S * (longest / SHORTEST_FREEZE_S) ** dice.random()
    operations: list[Operation | None] = [*OPERATION_SHARES, None]
    shares = [*OPERATION_SHARES.values(), 1 - sum(OPERATION_SHARES.values())]
    (during,) = dice.choices(operations, shares)
    return Fault(number, pause_s, targets, freeze_s, during, dice.uniform(0.0, 1.5), dice.getrandbits(32))


def only(faults: list[Fault], *, without: set[Operation]) -> list[Fault]:
    """The faults without some operations."""
    return [replace(one, during=None) if one.during in without else one for one in faults]
