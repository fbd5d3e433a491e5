"""Requests that no instance has room for yet, kept where all instances are in view.

In the paper a request is bound to an instance at once. It then waits for room on this instance, while others
may have room sooner, and holds up the requests that are queued behind it. Here requests wait in one line for
all instances, and each goes as soon as it fits one. So that large requests do not starve, the first in line
is bound after a while to the freest instance. That instance takes no other request until it has room, and
gives running requests away to make room (de-fragmentation). Only few instances do so at a time, because their
free memory is idle meanwhile.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from router.dispatcher import Dispatcher
from router.request import Demand, NewRequest


class WaitingRequest(NamedTuple):
    """`place` is the priority and the number of the arrival: the order of the line."""

    place: tuple[int, int]
    request_id: str
    request: NewRequest
    since: float


class WaitingLine:
    """Requests in the order of priority, then arrival."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._line: list[WaitingRequest] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[str]:
        return (waiting.request_id for waiting in self._line)

    @property
    def demand(self) -> Demand:
        """Number and prompt tokens of all waiting requests."""
        return Demand(len(self._line), sum(waiting.request.prompt_tokens for waiting in self._line))

    def add(self, request_id: str, request: NewRequest, now: float) -> None:
        self._count += 1
        waiting = WaitingRequest((request.priority, self._count), request_id, request, now)
        bisect.insort(self._line, waiting, key=lambda waiting: waiting.place)

    def discard(self, request_id: str) -> None:
        """Takes a request out of the line. Unknown requests are ignored."""
        self._line = [waiting for waiting in self._line if waiting.request_id != request_id]

    def take(self, instance_id: str, now: float) -> list[str]:
        """Takes out the requests that can be dispatched now that an instance has reported: those that fit
        there, or else the first in line, if it is overdue and another instance may be bound."""
        taken: list[WaitingRequest] = []
        free_blocks = self._dispatcher.admissible_blocks(instance_id)
        if free_blocks <= 0 and not self._is_overdue(now):
            return []
        load = self._dispatcher.loads[instance_id]
        for waiting in self._line:
            num_blocks = load.blocks_for(waiting.request.prompt_tokens)
            if num_blocks <= free_blocks:
                taken.append(waiting)
                free_blocks -= num_blocks
        if not taken and self._is_overdue(now) and self._dispatcher.may_bind:
            taken = self._line[:1]
        if taken:
            places = {waiting.place for waiting in taken}
            self._line = [waiting for waiting in self._line if waiting.place not in places]
        return [waiting.request_id for waiting in taken]

    def _is_overdue(self, now: float) -> bool:
        return bool(self._line) and now - self._line[0].since >= self._dispatcher.policies.bind_after_s
