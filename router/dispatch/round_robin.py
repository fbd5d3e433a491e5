"""Round robin."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


class RoundRobin:
    """The instance that was not chosen for the longest time.

    In a fixed cluster this is the paper's "fewest dispatched". Counted since the start, an instance that
    joins late would get every request until it has caught up; in turns it gets its share.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._last_turns: dict[str, int] = {}

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        def last_turn(load: InstanceLoad) -> tuple[int, int, str]:
            return self._last_turns.get(load.instance_id, 0), load.requests_added, load.instance_id

        chosen = min(loads, key=last_turn, default=None)
        if chosen is not None:
            self._turn += 1
            # The dictionary is in the order of turns: instances that are gone end up first, and are dropped.
            self._last_turns.pop(chosen.instance_id, None)
            self._last_turns[chosen.instance_id] = self._turn
            while len(self._last_turns) > 2 * len(loads):
                del self._last_turns[next(iter(self._last_turns))]
        return chosen
