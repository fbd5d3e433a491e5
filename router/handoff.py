"""The instances that a prefilled request may be handed off to, best first."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from router.plugins import PolicyKind
from router.priority import PriorityClass, priority_class


class HandoffPolicy(Protocol):
    """Ranks destinations. Each API server has its own."""

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        """The given instances, best first.

        Args:
            loads: Projected loads of decode and neutral instances that do not drain.
            num_blocks: KV blocks of the request.
            priority: vLLM's priority of the request.
        """
        ...


class FreestDestination:
    """The instance that is freest after it has taken the request.

    An instance that looks too full comes last instead of being left out: it may have room when the prompt is
    prefilled, and refuses by itself if not. For a request of high priority headroom does not count, as in
    `router.freeness.dispatch_freeness`; otherwise each of them would claim another instance.
    """

    def rank(self, loads: Sequence[InstanceLoad], num_blocks: int, priority: int) -> list[InstanceLoad]:
        without_headroom = priority_class(priority) is PriorityClass.HIGH

        def preference(load: InstanceLoad) -> tuple[bool, float, str]:
            if without_headroom:
                load = replace(load, high_priority=0)
            fits = load.free_blocks - load.expected_blocks >= num_blocks
            return not fits, -freeness(load.with_arrivals(num_blocks)), load.instance_id

        return sorted(loads, key=preference)


HANDOFF: PolicyKind[HandoffPolicy] = PolicyKind("handoff", "rank", {"freest": FreestDestination})


def can_receive(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """Decode and neutral instances that do not drain."""
    return [load for load in loads if load.role in ("decode", "neutral") and not load.draining]
