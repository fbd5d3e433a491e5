"""Virtual usage and freeness: the free memory of an instance as one number. Higher is freer.

Load balancing, de-fragmentation, priorities and draining all compare freeness. They differ in what a request
counts for (its virtual usage).
"""

import math
from collections.abc import Iterable

from msgspec.structs import replace

from router.load import InstanceLoad
from router.priority import PriorityClass, priority_class
from router.request import NO_DEMAND, Demand

#: Load in tokens that an instance with requests of high priority is kept near; the rest is headroom.
HIGH_PRIORITY_LOAD_TOKENS = 1600


def headroom(load: InstanceLoad) -> int:
    """Blocks kept empty for the requests of high priority in the batch, counted once per instance.

    Source: Llumnix (OSDI 2024), section 4.4.2 and 6.4: all blocks but those of 1,600 tokens.
    """
    if not load.high_priority:
        return 0
    return max(0, load.total_blocks - load.blocks_for(HIGH_PRIORITY_LOAD_TOKENS))


def limit_headroom(loads: Iterable[InstanceLoad], share: float) -> list[InstanceLoad]:
    """The loads, with headroom on at most this share of each pool, and on at least one instance if it is > 0.

    The instances with the most requests of high priority keep headroom; the others count as if they had none.
    Without a limit a tenth of long requests claims a whole pool: each instance is then too full for requests
    of normal priority and has to give its own away (docs/policies.md). The paper has no limit: 1.
    """
    loads = list(loads)
    claiming = [load for load in loads if load.high_priority]
    if share >= 1.0 or not claiming:
        return loads
    kept: set[str] = set()
    for role in dict.fromkeys(load.role for load in claiming):
        most = max(1, int([load.role for load in loads].count(role) * share)) if share > 0 else 0
        pool = [load for load in claiming if load.role == role]
        pool.sort(key=lambda load: (-load.high_priority, load.instance_id))
        kept.update(load.instance_id for load in pool[:most])
    return [
        replace(load, high_priority=0) if load.high_priority and load.instance_id not in kept else load
        for load in loads
    ]


def virtual_usage(load: InstanceLoad) -> float:
    """Blocks in use or claimed.

    Counted are the blocks of running requests, headroom, the demand of the first queued request (those behind
    it: nothing), the demand on its way, and free blocks that the time per token leaves no use for. The first
    queued request counts so that a queue shows that free blocks elsewhere could serve (de-fragmentation). A
    draining instance has infinite usage.

    Source: Llumnix (OSDI 2024), algorithm 1.
    """
    if load.draining:
        return math.inf
    used = load.total_blocks - load.free_blocks
    used += load.slow_blocks + load.head_of_line_blocks + load.expected_blocks
    return used + headroom(load) if load.high_priority else used


def freeness(load: InstanceLoad, arriving_blocks: int = 0, arriving: int = 0) -> float:
    """F = (M - sum of virtual usage) / B: decode steps left, in blocks. Migration decides by it.

    It may be negative. An idle instance counts as a batch of one: its freeness is its whole capacity, the
    highest of its kind, as the paper's infinity is, and finite.

    Args:
        arriving_blocks, arriving: Blocks of further requests, and their number, as if these had arrived.

    Source: Llumnix (OSDI 2024), section 4.4.2.
    """
    requests = load.running + load.expected_requests + arriving
    return (load.total_blocks - virtual_usage(load) - arriving_blocks) / (requests or 1)


def dispatch_freeness(load: InstanceLoad, priority: int = 0) -> float:
    """F for dispatch: all queued requests count, in blocks and in the batch.

    With only the first one counted, as in `freeness`, a burst would pile up on the instance that was freest
    when it began.

    Args:
        priority: The request's. Headroom does not count for a request of high priority: such requests share
            the few instances that headroom keeps free, instead of claiming every instance.

    Source: Llumnix (OSDI 2024), section 6.1 (the load that INFaaS++ dispatches by) and its artifact.
    """
    if load.draining:
        return -math.inf
    kept = headroom(load) if priority_class(priority) is PriorityClass.HIGH else 0
    return (_unclaimed(load) + kept) / max(_requests(load), 1)


def fragmented_blocks(head_of_line: Iterable[int], free_blocks: int) -> int:
    """Free blocks that would serve queued requests if they were on other instances.

    The demands of the first request in each queue, smallest first, as far as all free blocks of the cluster
    together could hold them.

    Source: Llumnix (OSDI 2024), section 6.3, figure 12.
    """
    fragmented = 0
    for demand in sorted(head_of_line):
        if fragmented + demand > free_blocks:
            break
        fragmented += demand
    return fragmented


def pooled_freeness(
    loads: Iterable[InstanceLoad], more_blocks: float = 0, waiting: Demand = NO_DEMAND
) -> float:
    """Average freeness of a pool: all free blocks per request of all. Scaling decides by it.

    Headroom does not count: it steers requests among instances, and is no use of memory.

    The mean of the instances' freeness would be infinite with one idle instance (in the paper), or so high
    that it hides that all others are full. Here an idle instance counts with its blocks.

    Args:
        loads: Instances that do not drain.
        more_blocks: Blocks to add to the pool; negative to take away.
        waiting: Requests for this pool that it does not have yet.

    Source: Llumnix (OSDI 2024), section 4.4.3; its artifact pools in the same way.
    """
    pool = list(loads)
    free = sum(_unclaimed(load) + headroom(load) for load in pool) + more_blocks
    if waiting.requests and pool:
        free -= waiting.tokens / pool[0].block_tokens * pool[0].full_groups + waiting.blocks
    return free / max(sum(_requests(load) for load in pool) + waiting.requests, 1)


def _unclaimed(load: InstanceLoad) -> int:
    claimed = load.watermark_blocks + load.waiting_blocks + load.expected_blocks + headroom(load)
    return load.free_blocks - load.slow_blocks - claimed


def _requests(load: InstanceLoad) -> int:
    return load.running + load.waiting + load.expected_requests
