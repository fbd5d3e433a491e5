"""Decode and neutral pools: by the average room per request."""

from collections.abc import Sequence

from router.freeness import pooled_freeness
from router.load import InstanceLoad
from router.policies import PolicySet
from router.request import NO_DEMAND, Demand
from router.scaling.decisions import Wanted

#: How many instances one look may ask for.
MAX_CHANGE = 4


def by_freeness(
    loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand = NO_DEMAND
) -> Wanted:
    """Average F < t: more instances until it is not. F without one > t + margin: one less.

    Instances on their way count as idle ones; where one is taken away, the others hold what it has.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """
    size = sum(load.total_blocks for load in loads) / max(len(loads), 1)
    free = pooled_freeness(loads, starting * size, waiting)
    for change in range(MAX_CHANGE + 1):
        if pooled_freeness(loads, (starting + change) * size, waiting) >= policies.scale_threshold:
            break
    if change:
        return Wanted(change, f"average freeness {free:.1f} < {policies.scale_threshold:g}")
    without, most = pooled_freeness(loads, -size, waiting), policies.scale_threshold + policies.scale_margin
    if not starting and without > most:
        return Wanted(-1, f"average freeness without it {without:.1f} > {most:g}")
    return Wanted(0, f"average freeness {free:.1f}")
