"""The paper's rescheduling: the least free instance gives to the freest, the next to the next, ..."""

from collections.abc import Sequence

from router.freeness import freeness
from router.load import InstanceLoad
from router.policies import PolicySet
from router.rescheduling.base import Move, move, pools


def in_flight(load: InstanceLoad) -> int:
    """Migrations that keep an instance from another one. To a decode instance arrivals are hand-offs."""
    return load.migrating_out + (load.migrating_in if load.role == "neutral" else 0)


def moves(loads: Sequence[InstanceLoad], policies: PolicySet) -> list[Move]:
    """Sources are less free than the threshold, hold preempted requests or drain; destinations are freer.
    Nothing asks whether the pair is better off afterwards.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """
    found = []
    for pool in pools(loads):
        ready = [(freeness(load), load) for load in pool if in_flight(load) < policies.max_moves]
        sources, destinations = [], []
        for free, load in ready:
            if free < policies.migration_threshold or load.preempted:
                if load.running:
                    sources.append((free, load.instance_id, load))
            elif free > policies.migration_threshold:
                destinations.append((-free, load.instance_id, load))
        for source, destination in zip(sorted(sources), sorted(destinations), strict=False):
            found.append(move(source[-1], destination[-1], policies))
    return found
