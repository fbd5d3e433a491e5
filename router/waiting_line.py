"""Requests that no instance has room for yet, kept where all instances are in view.

Bound to an instance at once, as in the paper, a request waits for the room that this one instance will have,
while others may have it sooner, and it holds up whoever is queued there behind it. Here it waits in one line
for all, and whoever fits goes. So that large ones do not wait for ever, the first in line is bound in the
end, to the instance that is freest. That takes nobody else until it has room, and makes room by giving
requests away (de-fragmentation); only few instances do so at a time: their free memory lies idle meanwhile.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from router.dispatcher import Dispatcher
from router.request import Demand, NewRequest


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    priority: int
    number: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    place: _Place
    request_id: str
    request: NewRequest
    since: float


class WaitingLine:
    """In the order of priority, then arrival."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._line: list[_Waiting] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[str]:
        return (waiting.request_id for waiting in self._line)

    @property
    def demand(self) -> Demand:
        """What all of them together ask for."""
        return Demand(len(self._line), sum(waiting.request.prompt_tokens for waiting in self._line))

    def add(self, request_id: str, request: NewRequest, now: float) -> None:
        self._count += 1
        place = _Place(request.priority, self._count)
        bisect.insort(self._line, _Waiting(place, request_id, request, now), key=lambda w: w.place)

    def discard(self, request_id: str) -> None:
        self._line = [waiting for waiting in self._line if waiting.request_id != request_id]

    def take(self, instance_id: str, now: float) -> list[str]:
        """Who goes now that this instance has reported: whoever fits there; and the first in line, if it has
        waited for long and not too many are bound already."""
        taken: list[_Waiting] = []
        room = self._dispatcher.admissible_blocks(instance_id)
        if room <= 0 and not self._is_overdue(now):
            return []
        for waiting in self._line:
            num_blocks = self._dispatcher.prompt_blocks(instance_id, waiting.request)
            if num_blocks <= room:
                taken.append(waiting)
                room -= num_blocks
        if not taken and self._is_overdue(now) and self._dispatcher.may_bind:
            taken = self._line[:1]
        if taken:
            gone = {waiting.place for waiting in taken}
            self._line = [waiting for waiting in self._line if waiting.place not in gone]
        return [waiting.request_id for waiting in taken]

    def _is_overdue(self, now: float) -> bool:
        return bool(self._line) and now - self._line[0].since >= self._dispatcher.policies.bind_after_s
