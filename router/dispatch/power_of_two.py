"""Power of two choices."""

import random
from collections.abc import Sequence

from router.dispatch.queue_length import queue_length
from router.load import InstanceLoad
from router.request import NewRequest


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
