"""Prefix-aware dispatch, for instances with a prefix cache."""

import random
from collections.abc import Sequence

from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.request import NewRequest


class LongestPrefix:
    """The instance that will compute the prompt first: least backlog + prompt - cached prefix, in tokens.

    So the longest prefix wins, unless a backlog outweighs what it saves; among equals, the freest instance.
    """

    uses_prefixes = True

    def work(self, load: InstanceLoad, request: NewRequest) -> int:
        """Tokens to be computed until the request has its first token."""
        return load.waiting_tokens + request.prompt_tokens - load.cached_tokens

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        def cost(load: InstanceLoad) -> tuple[int, float, str]:
            return self.work(load, request), -dispatch_freeness(load), load.instance_id

        return min(loads, key=cost, default=None)
