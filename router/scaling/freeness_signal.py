"""Scaling by freeness, for decode and neutral pools."""

from collections.abc import Sequence

from router.freeness import pooled_freeness
from router.load import InstanceLoad
from router.request import NO_DEMAND, Demand
from router.scaling.decisions import SizeChange
from router.settings import PolicySet

#: Instances that one look may ask for.
MAX_CHANGE = 4


class FreenessSignal:
    """Average freeness F: below `scale_threshold` more instances until it is not; above it by `scale_margin`
    with one instance less, one less.

    Starting instances count as idle; the load of an instance that goes is spread over the others.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """

    def look(
        self,
        loads: Sequence[InstanceLoad],
        starting: int,
        policies: PolicySet,
        waiting: Demand = NO_DEMAND,
    ) -> SizeChange:
        low, high = policies.scale_threshold, policies.scale_threshold + policies.scale_margin
        size = sum(load.total_blocks for load in loads) / max(len(loads), 1)
        free = pooled_freeness(loads, starting * size, waiting)
        for change in range(MAX_CHANGE + 1):
            if pooled_freeness(loads, (starting + change) * size, waiting) >= low:
                break
        if change:
            return SizeChange(change, f"average freeness {free:.1f} < {low:g}")
        without = pooled_freeness(loads, -size, waiting)
        if not starting and without > high:
            return SizeChange(-1, f"average freeness without it {without:.1f} > {high:g}")
        return SizeChange(0, f"average freeness {free:.1f}")
