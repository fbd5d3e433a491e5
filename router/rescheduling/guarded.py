"""Our rescheduling: as many moves as the loads ask for, each counted before the next, none for the worse."""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

from router.load import InstanceLoad
from router.policies import PolicySet
from router.rescheduling.base import Move, mean_blocks, move, pools
from router.rescheduling.guard import has_space, improves, room, settled


def moves(loads: Sequence[InstanceLoad], policies: PolicySet) -> list[Move]:
    """Like the paper's, the least free gives to the freest, but it may give more, and again in the same
    round, until it is free enough, has `max_moves` on their way, or no move would make the pair better.
    """
    return [found for pool in pools(loads) for found in _level(pool, policies)]


def _gives(load: InstanceLoad, policies: PolicySet) -> bool:
    """Whether it has a reason to give something away, and something to give."""
    wants = load.draining or load.preempted or room(settled(load)) < policies.migration_threshold
    return bool(wants) and load.running > load.migrating_out


def _level(pool: Sequence[InstanceLoad], policies: PolicySet) -> list[Move]:
    found: list[Move] = []
    slots: dict[str, int] = {}  # moves that an instance may still be part of
    sources: list[tuple[float, str, InstanceLoad]] = []
    destinations: list[tuple[float, str, InstanceLoad]] = []
    for load in pool:
        if _gives(load, policies):
            slots[load.instance_id] = policies.max_moves - load.migrating_out
            if slots[load.instance_id] > 0:
                after = settled(load)
                sources.append((room(after), load.instance_id, after))
        elif not load.draining:
            slots[load.instance_id] = policies.max_moves
            destinations.append((-room(load), load.instance_id, load))
    heapify(sources)
    heapify(destinations)
    while sources and destinations:
        source, destination = sources[0][-1], destinations[0][-1]
        num_blocks = mean_blocks(source)
        if source.draining:  # it has to go, wherever there is space
            worth = has_space(destination, num_blocks)
        else:
            worth = room(destination) > policies.migration_threshold and improves(
                source, destination, num_blocks
            )
        if not worth:
            heappop(sources)  # if not with the freest, then with nobody
            continue
        found.append(move(source, destination, policies))
        _update(sources, source.after_giving(num_blocks), slots, policies, 1)
        _update(destinations, destination.after_taking(num_blocks), slots, policies, -1)
    return found


def _update(
    heap: list[tuple[float, str, InstanceLoad]],
    load: InstanceLoad,
    slots: dict[str, int],
    policies: PolicySet,
    sign: int,
) -> None:
    """Puts the first of a heap back as it is now, if it can be part of another move."""
    slots[load.instance_id] -= 1
    enough = sign > 0 and not (load.running and (load.draining or room(load) < policies.migration_threshold))
    if slots[load.instance_id] <= 0 or enough:
        heappop(heap)
    else:
        heapreplace(heap, (sign * room(load), load.instance_id, load))
