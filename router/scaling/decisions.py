"""What a scaling signal says of a pool, and what becomes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.load import InstanceLoad
from router.policies import PolicySet
from router.request import Demand


class PoolBounds(NamedTuple):
    """Least and greatest number of instances of a pool."""

    least: int
    most: int


class Wanted(NamedTuple):
    """Attributes:
    change: More instances, or -1: one could go. 0: as many as there are.
    reason: One line.
    """

    change: int
    reason: str


#: Looks at the instances of a pool that take requests, at the number that is on its way, and at the requests
#: that no instance has yet.
Signal = Callable[[Sequence[InstanceLoad], int, PolicySet, Demand], Wanted]


@dataclass(frozen=True, slots=True)
class Start:
    """One more instance of this role."""

    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """This one takes nothing new from now on (or again, if `draining` is false)."""

    instance_id: str
    reason: str
    draining: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """This one is drained and empty."""

    instance_id: str
    reason: str


Decision = Start | Drain | Stop
