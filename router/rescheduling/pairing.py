"""Pairs of instances: the least free one gives to the freest, the next to the next, and so on."""

from collections.abc import Sequence

from router.freeness import freeness
from router.load import InstanceLoad
from router.rescheduling.gain import has_free_blocks
from router.rescheduling.move import MoveOrder, make_move, pools
from router.settings import PolicySet


class Pairs:
    """The least free instance gives one request to the freest, the next to the next.

    Sources are less free than the threshold, hold preempted requests or drain; destinations are freer. A
    draining instance may give to any instance with enough free blocks. An instance takes part while fewer
    than `max_moves` of its migrations are in flight.

    Source: Llumnix (OSDI 2024), section 4.4.3.
    """

    def moves(self, loads: Sequence[InstanceLoad], policies: PolicySet) -> list[MoveOrder]:
        found: list[MoveOrder] = []
        for pool in pools(loads):
            ready = [(freeness(load), load) for load in pool if in_flight(load) < policies.max_moves]
            sources, destinations = [], []
            for free, load in ready:
                if load.running and (free < policies.migration_threshold or load.preempted):
                    sources.append((free, load.instance_id, load))
                if not load.draining and not load.preempted:
                    destinations.append((-free, load.instance_id, load))
            receiving: set[str] = set()
            for (_, name, source), (free, destination_name, destination) in zip(
                sorted(sources), sorted(destinations), strict=False
            ):
                if name in receiving:
                    continue
                if -free > policies.migration_threshold or _may_drain(source, destination):
                    receiving.add(destination_name)
                    found.append(make_move(source, destination, policies))
        return found


def in_flight(load: InstanceLoad) -> int:
    """Migrations that count against `max_moves`. Arrivals at a decode instance are hand-offs, and do not."""
    return load.migrating_out + (load.migrating_in if load.role == "neutral" else 0)


def _may_drain(source: InstanceLoad, destination: InstanceLoad) -> bool:
    return source.draining and has_free_blocks(destination, source.mean_blocks)
