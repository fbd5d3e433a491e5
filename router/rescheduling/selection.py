"""Which request an instance moves when the scheduler orders it to move one.

Only a drain moves requests of high priority.
"""

import logging
from collections.abc import Sequence
from typing import Protocol, TypeVar

from router.load import InstanceLoad
from router.plugins import PolicyChoice, PolicyKind
from router.priority import PriorityClass, priority_class
from router.projected_loads import after_departures
from router.rescheduling.gain import freeness_after_move, has_free_blocks, is_worth_moving

logger = logging.getLogger(__name__)


class Movable(Protocol):
    """A running request, as its engine describes it (`migration.engine_interface.RunningRequest`)."""

    @property
    def priority(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def arrived_at(self) -> float: ...


M = TypeVar("M", bound=Movable)


class SelectionPolicy(Protocol):
    """Chooses the request to move, in the source instance."""

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        """One of the requests, or None if no move is worth it.

        Args:
            requests: Requests that can move; those that are leaving already are left out.
            source: Load of this instance; requests that are leaving are part of it.
            destination: Projected load as the scheduler sees it, without this move.
        """
        ...


class Shortest:
    """The paper's rule: lower priority first, then the shortest sequence.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        return min(_normal(requests), key=lambda r: (-r.priority, r.num_tokens), default=None)


class Latest:
    """The rule of the paper's artifact: lower priority first, then the latest arrival."""

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        return max(_normal(requests), key=lambda r: (r.priority, r.arrived_at), default=None)


class Guarded:
    """The paper's rule among the requests whose move leaves the pair of instances better off."""

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        return Shortest().select(_worth_moving(requests, source, destination), source, destination)


class Levelling:
    """Lower priority first, then the request whose move leaves the less free instance freest."""

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        remaining = after_departures(source)

        def outcome(request: M) -> tuple[int, float, int]:
            after = freeness_after_move(remaining, destination, source.blocks_for(request.num_tokens))
            return request.priority, after, -request.num_tokens

        return max(_worth_moving(requests, source, destination), key=outcome, default=None)


class ForDrain:
    """Any request that fits the destination, as all have to go: lower priority first, then the shortest."""

    def select(self, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> M | None:
        fitting = [r for r in requests if has_free_blocks(destination, source.blocks_for(r.num_tokens))]
        return min(fitting, key=lambda r: (-r.priority, r.num_tokens), default=None)


SELECTION: PolicyKind[SelectionPolicy] = PolicyKind(
    "selection",
    "select",
    {
        "shortest": Shortest,
        "latest": Latest,
        "guarded": Guarded,
        "levelling": Levelling,
        "drain": ForDrain,
    },
)


class RequestSelector:
    """Chooses by the policy that an order names. One per instance.

    An order whose policy is not installed here, or fails, is refused; the first time it is logged.

    Attributes:
        num_refused: Number of such orders.
    """

    def __init__(self) -> None:
        self._policies: dict[PolicyChoice, SelectionPolicy] = {}
        self._refused: set[PolicyChoice] = set()
        self.num_refused = 0

    def select(
        self, choice: PolicyChoice, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad
    ) -> M | None:
        """The request to move, or None; see `SelectionPolicy.select`."""
        try:
            if choice not in self._policies:
                self._policies[choice] = SELECTION.make(choice)
            return self._policies[choice].select(requests, source, destination)
        except Exception as error:  # whatever an own policy does: the instance goes on
            self.num_refused += 1
            if choice not in self._refused:
                self._refused.add(choice)
                logger.error("%s refuses moves by %r: %r", source.instance_id, choice.name, error)
            return None


def _normal(requests: Sequence[M]) -> list[M]:
    return [r for r in requests if priority_class(r.priority) is not PriorityClass.HIGH]


def _worth_moving(requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad) -> list[M]:
    remaining = after_departures(source)

    def is_worth_it(request: M) -> bool:
        return is_worth_moving(remaining, destination, source.blocks_for(request.num_tokens))

    return list(filter(is_worth_it, _normal(requests)))
