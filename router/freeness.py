"""Virtual usage and freeness: one number that says how much room an instance has. Higher is freer.

Load balancing, de-fragmentation, priorities and draining are all the same comparison of freeness; what
makes them different is what a request counts for (its virtual usage).
"""

import math
from collections.abc import Iterable

from router.load import InstanceLoad
from router.priority import PriorityClass, priority_class
from router.request import NO_DEMAND, Demand

#: High priority keeps the real load of its instance near so many tokens; the rest is headroom.
HIGH_PRIORITY_LOAD_TOKENS = 1600


def headroom(load: InstanceLoad) -> int:
    """Blocks kept empty for the requests of high priority in the batch, counted once per instance.

    Source: Llumnix (OSDI 2024), section 4.4.2 and 6.4: all blocks but those of 1,600 tokens.
    """
    if not load.high_priority:
        return 0
    return max(0, load.total_blocks - HIGH_PRIORITY_LOAD_TOKENS // load.block_tokens)


def virtual_usage(load: InstanceLoad) -> float:
    """Blocks in use or claimed.

    Running requests count with what they hold, plus headroom; the head of the line with its demand, which
    is how a queue that free blocks elsewhere could serve becomes visible (de-fragmentation); those behind
    it with nothing; what is on its way with what it was decided to need. A draining instance holds a fake
    request of infinite usage.

    Source: Llumnix (OSDI 2024), algorithm 1.
    """
    if load.draining:
        return math.inf
    used = load.total_blocks - load.free_blocks
    return used + load.head_of_line_blocks + load.expected_blocks + headroom(load)


def freeness(load: InstanceLoad) -> float:
    """F = (M - sum of virtual usage) / B: decode steps left, in blocks. What migration goes by.

    It may be negative. An idle instance has no batch to divide by; it counts as a batch of one, which
    makes its freeness its whole capacity: the highest of its kind, as the paper's infinity is, and finite.

    Source: Llumnix (OSDI 2024), section 4.4.2.
    """
    return (load.total_blocks - virtual_usage(load)) / max(load.running + load.expected_requests, 1)


def dispatch_freeness(load: InstanceLoad, priority: int = 0) -> float:
    """F as dispatch sees it: all queued requests count, in blocks and in the batch.

    With the head of the line only, as in `freeness`, a burst would pile up on the instance that was
    freest when it began.

    Args:
        priority: The request's. Headroom is kept for requests of high priority, not from them: they share
            the few instances whose real load it keeps low, instead of claiming every instance.

    Source: Llumnix (OSDI 2024), section 6.1 (the load that INFaaS++ dispatches by) and its artifact.
    """
    if load.draining:
        return -math.inf
    kept = headroom(load) if priority_class(priority) is PriorityClass.HIGH else 0
    return (_unclaimed(load) + kept) / max(_requests(load), 1)


def fragmented_blocks(head_of_line: Iterable[int], free_blocks: int) -> int:
    """Blocks that are free, would do for queued requests, and help none of them where they are.

    The demands of the first request in each queue, smallest first, as far as all free blocks of the cluster
    together could hold them.

    Source: Llumnix (OSDI 2024), section 6.3, figure 12.
    """
    useless = 0
    for demand in sorted(head_of_line):
        if useless + demand > free_blocks:
            break
        useless += demand
    return useless


def pooled_freeness(
    loads: Iterable[InstanceLoad], more_blocks: float = 0, waiting: Demand = NO_DEMAND
) -> float:
    """Average freeness of a pool: what all instances have free, per request of all. What scaling goes by.

    Instances' own freeness is not averaged: one that is idle has an infinite one (in the paper), or one so
    high that a single one would hide that all others are full. Here it counts with the blocks it has.

    Args:
        loads: None of them draining.
        more_blocks: How many more, or fewer, the pool would have.
        waiting: Requests for this pool that no instance has yet.

    Source: Llumnix (OSDI 2024), section 4.4.3; its artifact pools in the same way.
    """
    pool = list(loads)
    free = sum(_unclaimed(load) for load in pool) + more_blocks
    if waiting.requests and pool:
        free -= waiting.tokens / pool[0].block_tokens
    return free / max(sum(_requests(load) for load in pool) + waiting.requests, 1)


def _unclaimed(load: InstanceLoad) -> int:
    claimed = load.watermark_blocks + load.waiting_blocks + load.expected_blocks + headroom(load)
    return load.free_blocks - claimed


def _requests(load: InstanceLoad) -> int:
    return load.running + load.waiting + load.expected_requests
