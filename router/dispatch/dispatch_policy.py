"""What every dispatch policy is, and whom it may choose from."""

import random
from collections.abc import Iterable, Sequence
from typing import Protocol

from router.load import InstanceLoad
from router.request import NewRequest


class DispatchPolicy(Protocol):
    """Decides where a new request starts."""

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        """The best of `loads`, or None if there are none. Ties go by name.

        Args:
            loads: Candidates, all of one role, with what is dispatched and not yet reported counted in.
        """
        ...


def can_start(load: InstanceLoad) -> bool:
    """New requests go to prefill instances; neutral ones do both."""
    return load.role in ("prefill", "neutral") and not load.draining


def candidates(loads: Iterable[InstanceLoad]) -> list[InstanceLoad]:
    """Those that a new request may start on: prefill instances, or neutral ones where there are none."""
    able = [load for load in loads if can_start(load)]
    return [load for load in able if load.role == "prefill"] or able
