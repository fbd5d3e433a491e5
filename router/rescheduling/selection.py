"""Which request an instance moves away when it is told to move one. Rules by name; see `VICTIM_RULES`.

Load balancing never moves a request of high priority; only a drain does.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from router.load import InstanceLoad
from router.priority import PriorityClass, priority_class
from router.projected_loads import after_departures
from router.rescheduling.gain import has_space, improves, room


class Movable(Protocol):
    """A running request, as its engine describes it (`migration.engine_interface.RunningRequest`)."""

    @property
    def priority(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def arrived_at(self) -> float: ...


M = TypeVar("M", bound=Movable)
Rule = Callable[[Sequence[Movable], InstanceLoad, InstanceLoad], Movable | None]


def shortest(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """The paper's: lower priority first, then the shortest sequence.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """
    return min(_normal(requests), key=lambda r: (-r.priority, r.num_tokens), default=None)


def latest(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """The artifact's: lower priority first, then the latest arrival.

    Source: the Llumnix artifact, as described in FACTS of this project.
    """
    return max(_normal(requests), key=lambda r: (r.priority, r.arrived_at), default=None)


def guarded(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """The paper's choice among those whose move leaves the pair better off; see `rescheduling.guard`."""
    return shortest(_worth_it(requests, source, destination), source, destination)


def levelling(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """Lower priority first, then the one whose move leaves the less free one of the pair freest."""
    now = after_departures(source)

    def outcome(request: Movable) -> tuple[int, float, int]:
        num_blocks = blocks_of(request, source)
        after = min(room(now.with_departures(num_blocks)), room(destination.with_arrivals(num_blocks)))
        return request.priority, after, -request.num_tokens

    return max(_worth_it(requests, source, destination), key=outcome, default=None)


def drain(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """Everybody has to go: lower priority first, then the shortest, of those that find space there."""
    fit = [r for r in requests if has_space(destination, blocks_of(r, source))]
    return min(fit, key=lambda r: (-r.priority, r.num_tokens), default=None)


SELECTION_RULES: dict[str, Rule] = {
    "shortest": shortest,
    "latest": latest,
    "guarded": guarded,
    "levelling": levelling,
    "drain": drain,
}


def select_request(
    rule: str, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad
) -> M | None:
    """The request that goes, or None if no move is worth it.

    Args:
        requests: Those that could go; none that is going already.
        source: This instance, with those that are going already.
        destination: As the scheduler sees it, before this move.
    """
    return SELECTION_RULES[rule](requests, source, destination)  # type: ignore[return-value]


def blocks_of(request: Movable, source: InstanceLoad) -> int:
    return -(-request.num_tokens // source.block_tokens)


def _normal(requests: Sequence[Movable]) -> list[Movable]:
    return [r for r in requests if priority_class(r.priority) is not PriorityClass.HIGH]


def _worth_it(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> list[Movable]:
    now = after_departures(source)
    return [r for r in _normal(requests) if improves(now, destination, blocks_of(r, source))]
