"""The instances that a prefilled request may be handed off to, best first."""

import heapq
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from msgspec import Meta
from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from router.plugins import PolicyKind
from router.priority import PriorityClass, priority_class

#: Decode step where none has been measured yet, in seconds.
UNMEASURED_STEP_S = 0.03

#: Decode steps of a request for which a longer copy is weighed. How many it will need is not known.
TYPICAL_STEPS = 256

#: Destinations that a request is sent with. Where all refuse it, the router chooses again.
MAX_DESTINATIONS = 16

#: How well a request goes to an instance, the least one best: whether it is full, its freeness with the
#: request, negated, its id, and its place among the loads.
Ranking = tuple[bool, float, str, int]


class HandoffPolicy(Protocol):
    """Ranks destinations. Each API server has its own.

    A class with `uses_prefixes = True` gets `InstanceLoad.cached_tokens`.
    """

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        """The best of the given instances, best first. `MAX_DESTINATIONS` of them are used.

        Args:
            loads: Projected loads of decode and neutral instances that do not drain; `copy_s` is what a copy
                to another machine takes longer.
            num_blocks: KV blocks of the request.
            priority: vLLM's priority of the request.
        """
        ...


class FreestDestination:
    """The instance that is freest after it has taken the request.

    The freeness of an instance with a longer copy counts for the share of the request's time there that is
    not copying, as far as that can be known: `TYPICAL_STEPS` steps.

    An instance that looks too full comes last instead of being left out: it may have room when the prompt is
    prefilled, and refuses by itself if not. For a request of high priority headroom does not count, as in
    `router.freeness.dispatch_freeness`; otherwise each of them would claim another instance.
    """

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        best = heapq.nsmallest(MAX_DESTINATIONS, _rankings(loads, num_blocks, priority))
        return [loads[place] for *_, place in best]


@dataclass
class HolderDestination:
    """The instance with room that has most of the request's blocks already; among equals, the freest one.

    Blocks that the destination has are not copied.
    """

    uses_prefixes: ClassVar[bool] = True

    min_tokens: Annotated[
        int,
        Meta(ge=0, description="With fewer tokens of the request there, the freest one is better."),
    ] = 256

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        def preference(ranking: Ranking) -> tuple[bool, int, Ranking]:
            is_full, _, _, place = ranking
            cached = loads[place].cached_tokens
            return is_full, -cached if cached >= self.min_tokens else 0, ranking

        best = heapq.nsmallest(MAX_DESTINATIONS, _rankings(loads, num_blocks, priority), key=preference)
        return [loads[place] for *_, place in best]


HANDOFF: PolicyKind[HandoffPolicy] = PolicyKind(
    "handoff", "rank", {"freest": FreestDestination, "prefix": HolderDestination}
)


def _rankings(loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> Iterator[Ranking]:
    """Of each instance, by its freeness after it has taken the request."""
    is_high = priority_class(priority) is PriorityClass.HIGH
    stay_s = TYPICAL_STEPS * _step_s(loads) if any(load.copy_s for load in loads) else 0.0
    for place, load in enumerate(loads):
        counted = replace(load, high_priority=0) if is_high and load.high_priority else load
        free = freeness(counted, num_blocks, 1)
        if load.copy_s and free > 0:
            free *= stay_s / (stay_s + load.copy_s)
        yield not has_room(load, num_blocks), -free, load.instance_id, place


def _step_s(loads: Sequence[InstanceLoad]) -> float:
    """A decode step of these instances: one time for all, as a full batch's slower steps are in freeness."""
    steps = [load.decode_step_s for load in loads if load.decode_step_s]
    return statistics.median(steps) if steps else UNMEASURED_STEP_S


def has_room(load: InstanceLoad, num_blocks: int) -> bool:
    return load.free_blocks - load.expected_blocks >= num_blocks


def can_receive(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """Decode and neutral instances that do not drain."""
    return [load for load in loads if load.role in ("decode", "neutral") and not load.draining]
