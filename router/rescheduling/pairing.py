"""The paper's pairs: the least free instance gives to the freest, the next to the next, ...

One request per pair and round; a source goes on until `max_moves` of its migrations are in flight. The source
chooses the request: see `router.rescheduling.selection`, and `router.rescheduling.gain` for our rule.
"""

from collections.abc import Sequence

from router.freeness import freeness
from router.load import InstanceLoad
from router.policies import PolicySet
from router.rescheduling.gain import has_space
from router.rescheduling.move import Move, move, pools


def in_flight(load: InstanceLoad) -> int:
    """Migrations that keep an instance from another one. To a decode instance arrivals are hand-offs."""
    return load.migrating_out + (load.migrating_in if load.role == "neutral" else 0)


def moves(loads: Sequence[InstanceLoad], policies: PolicySet) -> list[Move]:
    """Sources are less free than the threshold, hold preempted requests or drain; destinations are freer.
    What drains has to go: wherever there is space, if nobody is freer.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """
    found: list[Move] = []
    for pool in pools(loads):
        ready = [(freeness(load), load) for load in pool if in_flight(load) < policies.max_moves]
        sources, takers = [], []
        for free, load in ready:
            if load.running and (free < policies.migration_threshold or load.preempted):
                sources.append((free, load.instance_id, load))
            if not load.draining and not load.preempted:
                takers.append((-free, load.instance_id, load))
        taken: set[str] = set()
        for (_, name, source), (free, taker_name, taker) in zip(
            sorted(sources), sorted(takers), strict=False
        ):
            if name in taken:
                continue
            if -free > policies.migration_threshold or _may_drain(source, taker):
                taken.add(taker_name)
                found.append(move(source, taker, policies))
    return found


def _may_drain(source: InstanceLoad, taker: InstanceLoad) -> bool:
    return source.draining and has_space(taker, source.mean_blocks)
