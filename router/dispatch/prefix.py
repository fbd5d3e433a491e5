"""Prefix-aware dispatch, for instances with a prefix cache."""

import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.request import PREFIX_TOKENS, NewRequest


class HeldPrefixes:
    """Prefixes that an instance was sent and that still fit into its KV blocks."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def num_tokens(self, request: NewRequest) -> int:
        """Tokens of the prompt that need no computing."""
        keys = request.prefix_keys
        # A longer prefix is dropped before the shorter ones that it begins with: bisection finds the end.
        return bisect_left(keys, True, key=lambda key: key not in self._keys) * PREFIX_TOKENS

    def add(self, request: NewRequest, load: InstanceLoad) -> None:
        for key in reversed(request.prefix_keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        blocks = load.total_blocks // max(load.full_groups + load.window_groups, 1)
        capacity = blocks * load.block_tokens // PREFIX_TOKENS
        while len(self._keys) > capacity:
            self._keys.popitem(last=False)


class LongestPrefix:
    """The instance that will compute the prompt first: least backlog + prompt - cached prefix, in tokens.

    So the longest prefix wins, unless a backlog outweighs what it saves; among equals, the freest instance.
    The cached prefixes are inferred from earlier dispatches: a new API server learns them as it goes.
    """

    def __init__(self) -> None:
        self._held: dict[str, HeldPrefixes] = {}

    def work(self, load: InstanceLoad, request: NewRequest) -> int:
        """Tokens to be computed until the request has its first token."""
        held = self._held.get(load.instance_id)
        cached = held.num_tokens(request) if held else 0
        return load.waiting_tokens + request.prompt_tokens - cached

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        def cost(load: InstanceLoad) -> tuple[int, float, str]:
            return self.work(load, request), -dispatch_freeness(load), load.instance_id

        chosen = min(loads, key=cost, default=None)
        if chosen is not None and request.prefix_keys:
            # The dictionary is in the order of use: instances that are gone end up first, and are dropped.
            held = self._held.pop(chosen.instance_id, None) or HeldPrefixes()
            held.add(request, chosen)
            self._held[chosen.instance_id] = held
            while len(self._held) > 2 * len(loads):
                del self._held[next(iter(self._held))]
        return chosen
