"""Shortest queue."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


def queue_length(load: InstanceLoad) -> tuple[int, int, str]:
    """Queued requests; among equals, running ones."""
    return load.waiting, load.running, load.instance_id


class ShortestQueue:
    """The instance with the fewest queued requests."""

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        return min(loads, key=queue_length, default=None)
