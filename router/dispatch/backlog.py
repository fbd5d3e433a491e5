"""Backlog: the instance with fewest prompt tokens to compute. For prefill pools."""

import random
from collections.abc import Sequence

from router.load import InstanceLoad
from router.request import NewRequest


def backlog(load: InstanceLoad) -> tuple[int, int, str]:
    """Prompt tokens still to be computed; among equals, requests."""
    return load.waiting_tokens, load.running + load.waiting, load.instance_id


class LeastBacklog:
    """A prefill instance holds a request for one step: what delays the next is work, not memory."""

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        return min(loads, key=backlog, default=None)
