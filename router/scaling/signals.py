"""What a pool needs: by freeness for decode and neutral pools, by utilisation for prefill pools."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

from msgspec import Meta

from router.freeness import pooled_freeness
from router.load import InstanceLoad
from router.request import Demand
from router.scaling.decisions import SizeChange
from router.settings import PolicySet

#: Instances that one look may ask for.
MAX_CHANGE = 4

#: Time in which waiting prompts should be worked off, in seconds.
WORK_OFF_S = 10.0


class FreenessSignal:
    """Average freeness F: below `scale_threshold` more instances until it is not; above it by `scale_margin`
    with one instance less, one less.

    Starting instances count as idle; the load of an instance that goes is spread over the others.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """

    def look(
        self, loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand
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


class BacklogSignal:
    """Prompt tokens waiting per instance: above `backlog_high_tokens` one more instance, below
    `backlog_low_tokens` without it one less."""

    def look(
        self, loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand
    ) -> SizeChange:
        high, low = policies.backlog_high_tokens, policies.backlog_low_tokens
        tokens = sum(load.waiting_tokens for load in loads) + waiting.tokens
        each = tokens / max(len(loads) + starting, 1)
        if each > high:
            return SizeChange(1, f"{each:.0f} prompt tokens wait per instance, > {high}")
        without = tokens / max(len(loads) - 1, 1)
        if not starting and without < low:
            return SizeChange(-1, f"{without:.0f} prompt tokens would wait per instance without it, < {low}")
        return SizeChange(0, f"{each:.0f} prompt tokens wait per instance")


class BusySignal:
    """Share of time that the instances are in steps, and the time to work off the prompts that wait: above
    `busy_high` more instances until it is not; below `busy_low` with one instance less, one less.

    A prefill instance frees its blocks with the hand-off: it runs short of compute, not of memory. Its queue
    is no measure: under a load that it keeps up with it is empty at most moments. It is the only one until a
    step has been measured.
    """

    def look(
        self, loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand
    ) -> SizeChange:
        busy = sum(load.busy for load in loads)
        token_s = max((load.prompt_token_s for load in loads), default=0.0)
        if not token_s:
            return BacklogSignal().look(loads, starting, policies, waiting)
        tokens = sum(load.waiting_tokens for load in loads) + waiting.tokens
        needed = busy + tokens * token_s / WORK_OFF_S
        count = len(loads) + starting
        if needed > policies.busy_high * count:
            change = min(math.ceil(needed / policies.busy_high) - count, MAX_CHANGE)
            return SizeChange(change, f"busy {needed / count:.0%} > {policies.busy_high:.0%}")
        without = needed / max(len(loads) - 1, 1)
        if not starting and without < policies.busy_low:
            return SizeChange(-1, f"busy without it {without:.0%} < {policies.busy_low:.0%}")
        return SizeChange(0, f"busy {needed / count:.0%}")


class WorkSignal:
    """Measured work, in instances: a pool has as many as keep each below `use`, and fewer once that many keep
    each below `use` - `margin`. Several come or go at a time; one look doubles or halves a pool at most, so
    that a wrong measurement does no more.

    The work of a prefill instance is the share of time that it is in steps: prompts/s x the time of a prompt.
    That of others is the share of the KV blocks in use of those that memory and `itl_target_s` leave: by
    Little's law, requests/s x the time of a request x its blocks. What waits counts in full.
    """

    def __init__(
        self,
        use: Annotated[
            float, Meta(gt=0, le=1, description="Share of an instance that work may take.")
        ] = 0.75,
        margin: Annotated[
            float, Meta(ge=0, lt=1, description="By how much less fewer instances have to be used.")
        ] = 0.1,
    ) -> None:
        self._use = use
        self._low = max(use - margin, use / 10)

    def look(
        self, loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand
    ) -> SizeChange:
        work = work_of(loads, waiting)
        count = len(loads) + starting
        reason = f"work for {work:.2f} instances at {self._use:.0%}"
        if (wanted := math.ceil(work / self._use)) > count:
            return SizeChange(min(wanted - count, max(count, MAX_CHANGE)), f"{reason}, {count} there")
        enough = max(math.ceil(work / self._low), 1)
        if not starting and enough < count:
            return SizeChange(-min(count - enough, max(count // 2, 1)), f"{reason}, {count} there")
        return SizeChange(0, reason)


def work_of(loads: Sequence[InstanceLoad], waiting: Demand) -> float:
    """What the instances of a pool do, and what waits for them, in instances that it would keep busy."""
    if all(load.role == "prefill" for load in loads):
        token_s = max((load.prompt_token_s for load in loads), default=0.0)
        tokens = sum(load.waiting_tokens for load in loads) + waiting.tokens
        return sum(load.busy for load in loads) + tokens * token_s / WORK_OFF_S
    usable = sum(load.total_blocks - load.watermark_blocks - load.slow_blocks for load in loads) / len(loads)
    blocks = sum(load.demanded_blocks for load in loads)
    return (blocks + loads[0].blocks_for(waiting.tokens) + waiting.blocks) / max(usable, 1)


def to_hand_off(loads: Iterable[InstanceLoad]) -> Demand:
    """What the prefill instances among these run: the decode pool does not have it yet.

    Where that pool is full, requests decode on the prefill instances until it has room.
    """
    prefill = [load for load in loads if load.role == "prefill"]
    blocks = sum(load.total_blocks - load.free_blocks for load in prefill)
    return Demand(sum(load.running for load in prefill), blocks=blocks)
