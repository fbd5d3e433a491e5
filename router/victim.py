"""Which request an instance moves away when it is told to move one. Rules by name; see `VICTIM_RULES`."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from router.load import InstanceLoad


class Movable(Protocol):
    """A running request, as its engine describes it (`migration.engine.RunningRequest`)."""

    @property
    def priority(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def arrived_at(self) -> float: ...


M = TypeVar("M", bound=Movable)


def shortest(requests: Sequence[Movable], source: InstanceLoad, destination: InstanceLoad) -> Movable | None:
    """The paper's: lower priority first, then the shortest sequence; high priority is never moved.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """
    normal = [request for request in requests if request.priority >= 0]
    return min(normal, key=lambda r: (-r.priority, r.num_tokens), default=None)


VICTIM_RULES: dict[str, Callable[[Sequence[Movable], InstanceLoad, InstanceLoad], Movable | None]] = {
    "shortest": shortest,
}


def choose_victim(
    rule: str, requests: Sequence[M], source: InstanceLoad, destination: InstanceLoad
) -> M | None:
    """The request that goes, or None if no move is worth it."""
    return VICTIM_RULES[rule](requests, source, destination)  # type: ignore[return-value]
