"""Policies that take the instance with the least of one measure of load."""

import random
from collections.abc import Sequence

from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.request import NewRequest


def backlog(load: InstanceLoad) -> tuple[int, int, str]:
    """Prompt tokens still to be computed, less what is cached of the new prompt; among equals, requests."""
    return load.waiting_tokens - load.cached_tokens, load.running + load.waiting, load.instance_id


def queue_length(load: InstanceLoad) -> tuple[int, int, str]:
    """Queued requests; among equals, running ones."""
    return load.waiting, load.running, load.instance_id


class LeastBacklog:
    """The instance with the fewest prompt tokens to compute until the new request has its first token.

    A prefill instance holds a request for one step: the next one is delayed by work, not by memory.
    """

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        return min(loads, key=backlog, default=None)


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
