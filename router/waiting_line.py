"""Requests that no instance has room for yet, kept where all instances are in view.

In the paper a request is bound to an instance at once. It then waits for room on this instance, while others
may have room sooner, and holds up the requests that are queued behind it. Here requests wait in one line for
all instances, and each goes as soon as it fits one. So that large requests do not starve, one that has waited
for a while is bound to the freest instance, whatever the priority of those before it; one of high priority is
bound at once, so that smaller requests of lower priority do not take its room. That instance takes no other
request until it has room, and gives running requests away to make room (de-fragmentation). Only few instances
do so at a time, because their free memory is idle meanwhile.
"""

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from router.dispatcher import Dispatcher
from router.fair_share import FairShare
from router.load import InstanceLoad
from router.priority import PriorityClass, priority_class
from router.request import Demand, NewRequest

#: Number of classes of prompt lengths per doubling, and number of requests of each class that are looked at
#: when an instance reports, the first in line: the cost of a report does not grow with the line.
CLASSES_PER_DOUBLING = 8
MEMBERS_LOOKED_AT = 4


class WaitingRequest(NamedTuple):
    """`place` is the priority, the time of the arrival with what counts as later, and its number: the order
    of the line. From `due_at` on, an instance has to make room for it."""

    place: tuple[int, float, int]
    request_id: str
    request: NewRequest
    due_at: float

    @property
    def size_class(self) -> int:
        return int(CLASSES_PER_DOUBLING * math.log2(max(self.request.prompt_tokens, 1)))


class WaitingLine:
    """Requests in the order of priority, then of shares if there are any, then of arrival and deadline.

    Args:
        shares: Divides the line among accounts; None: arrival and deadline alone decide.
    """

    def __init__(self, dispatcher: Dispatcher, shares: FairShare | None = None) -> None:
        self._dispatcher = dispatcher
        self._shares = shares
        self._waiting: dict[str, WaitingRequest] = {}
        #: By account and size, each in the order of the line.
        self._by_size: dict[tuple[int, int], list[WaitingRequest]] = {}
        #: By priority and account: heaps by time due and number; some have left.
        self._by_priority: dict[tuple[int, int], list[tuple[float, int, WaitingRequest]]] = {}
        self._tokens = 0
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return (one.request_id for one in sorted(self._waiting.values(), key=lambda one: one.place))

    @property
    def demand(self) -> Demand:
        """Number and prompt tokens of all waiting requests."""
        return Demand(len(self._waiting), self._tokens)

    def tokens_before(self, request: NewRequest, now: float) -> int:
        """Prompt tokens of the requests that a new request would wait behind."""
        place = (request.priority, now + request.arrives_later_s)
        waiting = self._waiting.values()
        before = [one.request for one in waiting if one.place[:2] <= place]
        if self._shares is None:
            return sum(one.prompt_tokens for one in before)
        # Every other account gets as much as this one before the request's turn, as far as it wants it.
        own = sum(one.prompt_tokens for one in before if one.account == request.account)
        others: Counter[int] = Counter()
        for one in waiting:
            if one.place[0] <= request.priority and one.request.account != request.account:
                others[one.request.account] += one.request.prompt_tokens
        return own + sum(min(tokens, own + request.prompt_tokens) for tokens in others.values())

    def waited_before(self, request: NewRequest, now: float) -> float:
        """How long the oldest request has waited that a new one would wait behind, and that is no longer: a
        shorter one may pass a longer one. With shares, of its own account."""
        place = (request.priority, now + request.arrives_later_s)
        arrivals = [
            one.place[1] - one.request.arrives_later_s
            for one in self._waiting.values()
            if one.place[:2] <= place
            and one.request.prompt_tokens <= request.prompt_tokens
            and (self._shares is None or one.request.account == request.account)
        ]
        return now - min(arrivals, default=now)

    def add(self, request_id: str, request: NewRequest, now: float) -> None:
        self._count += 1
        is_high = priority_class(request.priority) is PriorityClass.HIGH
        later_s = request.arrives_later_s
        due_at = now if is_high else now + max(later_s, 0.0) + self._dispatcher.policies.bind_after_s
        place = (request.priority, now + later_s, self._count)
        waiting = WaitingRequest(place, request_id, request, due_at)
        self.discard(request_id)
        self._waiting[request_id] = waiting
        if self._shares is not None:
            self._shares.begins_to_wait(request.account)
        self._tokens += request.prompt_tokens
        account = request.account
        members = self._by_size.setdefault((account, waiting.size_class), [])
        bisect.insort(members, waiting, key=lambda one: one.place)
        heap = self._by_priority.setdefault((request.priority, account), [])
        heapq.heappush(heap, (due_at, self._count, waiting))

    def discard(self, request_id: str) -> None:
        """Takes a request out of the line. Unknown requests are ignored."""
        if (waiting := self._waiting.pop(request_id, None)) is None:
            return
        self._tokens -= waiting.request.prompt_tokens
        account = waiting.request.account
        members = self._by_size[account, waiting.size_class]
        del members[bisect.bisect_left(members, waiting.place, key=lambda one: one.place)]
        if not members:
            del self._by_size[account, waiting.size_class]
        if self._shares is not None:
            self._shares.waits_no_more(account)
        if not self._waiting:
            self._by_priority.clear()

    def take(self, instance_id: str, now: float) -> list[str]:
        """Takes out the requests that can be dispatched now that an instance has reported: those that fit
        there, or one that is due and fits nowhere, if another instance may be bound."""
        if not self._waiting:
            return []
        taken: list[str] = []
        free_blocks = self._dispatcher.admissible_blocks(instance_id)
        room = self._dispatcher.admissible_tokens(instance_id)
        load = self._dispatcher.loads[instance_id] if free_blocks > 0 else None
        due = self._longest_due(now)
        fits = load is not None and due is not None and _needed(load, due) <= free_blocks
        if due is not None and not fits and self._dispatcher.may_bind:
            self._serve(due)
            return [due.request_id]
        while load is not None and room > 0 and (fitting := self._first_that_fits(load, free_blocks)):
            free_blocks -= _needed(load, fitting)
            room -= fitting.request.prompt_tokens
            taken.append(fitting.request_id)
            self._serve(fitting)
        return taken

    def _serve(self, waiting: WaitingRequest) -> None:
        if self._shares is not None:
            self._shares.starts(waiting.request.account, waiting.request.prompt_tokens)
        self.discard(waiting.request_id)

    def _served(self, waiting: WaitingRequest) -> float:
        return 0.0 if self._shares is None else self._shares.served(waiting.request.account)

    def _rank(self, waiting: WaitingRequest) -> tuple[int, float, float, int]:
        priority, arrival, number = waiting.place
        return priority, self._served(waiting), arrival, number

    def _first_that_fits(self, load: InstanceLoad, free_blocks: float) -> WaitingRequest | None:
        """The first in line that fits, as far as it is among the first of its size."""
        fitting = (
            one
            for members in self._by_size.values()
            for one in members[:MEMBERS_LOOKED_AT]
            if _needed(load, one) <= free_blocks
        )
        return min(fitting, key=self._rank, default=None)

    def _longest_due(self, now: float) -> WaitingRequest | None:
        """The request that has been due for longest, of the account that has been served least."""
        for key, heap in list(self._by_priority.items()):
            while heap and self._waiting.get(heap[0][2].request_id) is not heap[0][2]:
                heapq.heappop(heap)
            if not heap:
                del self._by_priority[key]
        firsts = [heap[0][2] for heap in self._by_priority.values()]
        due = [one for one in firsts if one.due_at <= now]
        return min(due, key=lambda one: (self._served(one), one.due_at, one.place), default=None)


def _needed(load: InstanceLoad, waiting: WaitingRequest) -> int:
    return load.blocks_for(waiting.request.prompt_tokens)
