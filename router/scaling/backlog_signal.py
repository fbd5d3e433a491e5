"""Scaling by backlog, for prefill pools."""

from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NO_DEMAND, Demand
from router.scaling.decisions import SizeChange
from router.settings import PolicySet


class BacklogSignal:
    """Prompt tokens waiting per instance: above `backlog_high_tokens` one more instance, below
    `backlog_low_tokens` without it one less.

    A prefill instance frees its blocks with the hand-off: it runs short of compute, not of memory.
    """

    def look(
        self,
        loads: Sequence[InstanceLoad],
        starting: int,
        policies: PolicySet,
        waiting: Demand = NO_DEMAND,
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
