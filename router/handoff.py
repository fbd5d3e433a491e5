"""The instances that a prefilled request may be handed off to, best first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from msgspec import Meta
from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from router.plugins import PolicyKind
from router.priority import PriorityClass, priority_class

#: Decode step of an instance that has measured none yet, in seconds.
UNMEASURED_STEP_S = 0.03

#: Decode steps that are left on a destination with plenty of room: more are no reason for a longer copy.
PLENTY_STEPS = 1024


class HandoffPolicy(Protocol):
    """Ranks destinations. Each API server has its own.

    A class with `uses_prefixes = True` gets `InstanceLoad.cached_tokens`.
    """

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        """The given instances, best first.

        Args:
            loads: Projected loads of decode and neutral instances that do not drain; with `copy_s` if some of
                them are on the machine of the request and some are not.
            num_blocks: KV blocks of the request.
            priority: vLLM's priority of the request.
        """
        ...


class FreestDestination:
    """The instance that is freest after it has taken the request.

    If some are on the request's machine and some are not, the decode steps that pass during a copy are taken
    from those that an instance has left, as far as that is not plenty.

    An instance that looks too full comes last instead of being left out: it may have room when the prompt is
    prefilled, and refuses by itself if not. For a request of high priority headroom does not count, as in
    `router.freeness.dispatch_freeness`; otherwise each of them would claim another instance.
    """

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        if priority_class(priority) is PriorityClass.HIGH:
            counted = [replace(load, high_priority=0) if load.high_priority else load for load in loads]
        else:
            counted = list(loads)
        has_distances = any(load.copy_s for load in counted)
        ranked = []
        for place, load in enumerate(counted):
            free = freeness(load, num_blocks, 1)
            near = remaining_steps(load, free) if has_distances else 0.0
            ranked.append((not has_room(load, num_blocks), -near, -free, load.instance_id, place))
        return [loads[place] for *_, place in sorted(ranked)]


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
        def preference(load: InstanceLoad) -> tuple[bool, int]:
            cached = load.cached_tokens if load.cached_tokens >= self.min_tokens else 0
            return not has_room(load, num_blocks), -cached

        return sorted(FreestDestination().rank(loads, num_blocks, priority), key=preference)


HANDOFF: PolicyKind[HandoffPolicy] = PolicyKind(
    "handoff", "rank", {"freest": FreestDestination, "prefix": HolderDestination}
)


def remaining_steps(load: InstanceLoad, free: float) -> float:
    """Decode steps left on an instance of this freeness after the copy of a request, at most plenty."""
    passed = load.copy_s / (load.decode_step_s or UNMEASURED_STEP_S)
    return min(free * load.block_tokens, PLENTY_STEPS) - passed


def has_room(load: InstanceLoad, num_blocks: int) -> bool:
    return load.free_blocks - load.expected_blocks >= num_blocks


def can_receive(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """Decode and neutral instances that do not drain."""
    return [load for load in loads if load.role in ("decode", "neutral") and not load.draining]
