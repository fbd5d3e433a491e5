"""Which decode instances a request may be handed off to, best first."""

from collections.abc import Iterable

from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from router.priority import PriorityClass, priority_class


def destinations(loads: Iterable[InstanceLoad], num_blocks: int, priority: int = 0) -> list[InstanceLoad]:
    """Decode instances by how free they are after taking a request of `num_blocks`.

    One that looks too full now comes last instead of being left out: by the time the prompt is prefilled
    it may have room, and it refuses by itself if not.

    Args:
        loads: With what was decided before and is not reported yet counted as expected, so that a burst
            spreads.
        priority: As in `router.freeness.dispatch_freeness`: headroom is kept for requests of high priority,
            not from them. Otherwise each of them would claim another instance.
    """
    without_headroom = priority_class(priority) is PriorityClass.HIGH

    def preference(load: InstanceLoad) -> tuple[bool, float, str]:
        if without_headroom:
            load = replace(load, high_priority=0)
        fits = load.free_blocks - load.expected_blocks >= num_blocks
        return not fits, -freeness(load.with_arrivals(num_blocks)), load.instance_id

    return sorted((load for load in loads if load.role == "decode" and not load.draining), key=preference)
