"""Shortest queue, of all instances or of two."""

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


class PowerOfTwo:
    """The instance with the shorter queue of two drawn at random.

    Nearly as even as comparing all queues, without herding on old reports.

    Source: Mitzenmacher, The power of two choices in randomized load balancing (2001).
    """

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        drawn = rng.sample(loads, min(2, len(loads)))
        return min(drawn, key=queue_length, default=None)
