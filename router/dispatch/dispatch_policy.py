"""The interface of dispatch policies, and the instances that they choose from."""

import random
from collections.abc import Iterable, Sequence
from typing import Protocol

from router.load import InstanceLoad
from router.request import NewRequest

#: Roles of instances that new requests start on.
STARTING = ("prefill", "neutral")


class DispatchPolicy(Protocol):
    """Decides where a new request starts. Each API server has its own.

    A class with `uses_prefixes = True` gets `InstanceLoad.cached_tokens` and `NewRequest.prefix_keys`.
    """

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        """The best of `loads`; None if it is empty.

        Args:
            loads: Projected loads of the instances that take new requests.
            rng: For policies that draw: with a given seed simulations repeat.
        """
        ...


def can_start(load: InstanceLoad) -> bool:
    """Whether new requests start on an instance: on prefill and neutral ones, unless they drain."""
    return load.role in STARTING and not load.draining


def candidates(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """The instances for a new request: prefill and neutral ones. Where none is alive, decode instances take
    their place: each has a whole engine."""
    staying = [load for load in loads if not load.draining]
    return [load for load in staying if load.role in STARTING] or staying
