"""The interface of scaling policies, and the decisions about instances."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from router.load import InstanceLoad
from router.request import Demand
from router.settings import PolicySet


class PoolBounds(NamedTuple):
    """Least and greatest number of instances of a pool."""

    least: int
    most: int


class SizeChange(NamedTuple):
    """What a pool needs: instances to add, or below 0 those that can go; 0 if the size is right; and why."""

    instances: int
    reason: str


class ScalingPolicy(Protocol):
    """Measures whether a pool has the right size, in the scheduler. `PoolScaler` acts on it."""

    def look(
        self, loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand
    ) -> SizeChange:
        """The change that the pool needs now.

        Args:
            loads: Projected loads of the instances of the pool that do not drain.
            starting: Instances that were asked for and do not report yet.
            waiting: Requests for this pool that it does not have yet.
        """
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """Start an instance of this role."""

    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Give an instance no new requests from now on; with `draining` false, use it again."""

    instance_id: str
    reason: str
    draining: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop an instance that is drained and empty."""

    instance_id: str
    reason: str


Decision = Start | Drain | Stop
