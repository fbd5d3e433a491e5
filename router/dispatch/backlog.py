"""Least backlog, for prefill instances."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


def backlog(load: InstanceLoad) -> tuple[int, int, str]:
    """Prompt tokens still to be computed; among equals, requests."""
    return load.waiting_tokens, load.running + load.waiting, load.instance_id


class LeastBacklog:
    """The instance with the fewest prompt tokens to compute.

    A prefill instance holds a request for one step: the next one is delayed by work, not by memory.
    """

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        return min(loads, key=backlog, default=None)
