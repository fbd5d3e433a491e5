"""Prefill pools: by the prompt tokens that wait per instance."""

from collections.abc import Sequence

from router.load import InstanceLoad
from router.policies import PolicySet
from router.request import NO_DEMAND, Demand
from router.scaling.decisions import Wanted


def by_backlog(
    loads: Sequence[InstanceLoad], starting: int, policies: PolicySet, waiting: Demand = NO_DEMAND
) -> Wanted:
    """More than `backlog_high_tokens`: one more. Less than `backlog_low_tokens` without one: one less.

    A prefill instance frees its blocks with the hand-off: what runs short is computing, never room.
    """
    tokens = sum(load.waiting_tokens for load in loads) + waiting.tokens
    each = tokens / max(len(loads) + starting, 1)
    if each > policies.backlog_high_tokens:
        return Wanted(1, f"{each:.0f} prompt tokens wait per instance, > {policies.backlog_high_tokens}")
    without = tokens / max(len(loads) - 1, 1)
    if not starting and without < policies.backlog_low_tokens:
        low = policies.backlog_low_tokens
        return Wanted(-1, f"{without:.0f} prompt tokens would wait per instance without it, < {low}")
    return Wanted(0, f"{each:.0f} prompt tokens wait per instance")
