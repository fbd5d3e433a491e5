"""Queue length: join the shortest queue."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


def queue_length(load: InstanceLoad) -> tuple[int, int, str]:
    """Requests that wait; among equals, those that run."""
    return load.waiting, load.running, load.instance_id


class ShortestQueue:
    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        return min(loads, key=queue_length, default=None)
