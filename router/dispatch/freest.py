"""Freest instance: INFaaS++ and Llumnix."""

import random
from collections.abc import Sequence

from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.request import NewRequest


class Freest:
    """The instance with the most free blocks per request, queued requests counted.

    Source: Llumnix (OSDI 2024), sections 4.4.3 and 6.1.
    """

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        def preference(load: InstanceLoad) -> tuple[float, str]:
            return -dispatch_freeness(load, request.priority), load.instance_id

        return min(loads, key=preference, default=None)
