"""The interface of dispatch policies, and the instances that they choose from."""

import random
from collections.abc import Iterable, Sequence
from typing import Protocol

from router.load import InstanceLoad
from router.request import NewRequest


class DispatchPolicy(Protocol):
    """Decides where a new request starts. Each API server has its own."""

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        """The best of `loads`; None if it is empty.

        Args:
            loads: Projected loads of instances of one role that take new requests.
            rng: For policies that draw: with a given seed simulations repeat.
        """
        ...


def can_start(load: InstanceLoad) -> bool:
    """Whether an instance takes new requests: prefill and neutral instances do, unless they drain."""
    return load.role in ("prefill", "neutral") and not load.draining


def candidates(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """The instances for a new request: prefill instances, or neutral ones where there are none."""
    starting = [load for load in loads if can_start(load)]
    return [load for load in starting if load.role == "prefill"] or starting
