"""Round robin: whoever has been passed over for longest."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


class RoundRobin:
    """In a fixed cluster this is the paper's "fewest dispatched". Counting since the start, though, an
    instance that joins late would get every request until it has caught up; taking turns, it gets its share.
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
            # Chosen last is last in the dictionary: the first ones are those that may be gone.
            self._last_turns.pop(chosen.instance_id, None)
            self._last_turns[chosen.instance_id] = self._turn
            while len(self._last_turns) > 2 * len(loads):
                del self._last_turns[next(iter(self._last_turns))]
        return chosen
