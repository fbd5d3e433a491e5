"""Data of the live page: an event about twice a second for every open page.

Instances are asked for the KV blocks of their requests only while a page is open.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.requests import Holdings, ListHoldings
from pd_serve.dashboard.recent import SLOT_S, Move, RecentEvents
from pd_serve.errors import PdServeError

#: Time between two events, and maximum wait for instances that are in the middle of a step.
INTERVAL_S = 0.5
PATIENCE_S = 0.15

#: Pages that may be open at a time, at all API servers.
MAX_WATCHERS = 16

#: Migrations in one event; the oldest ones are left out.
MAX_MOVES = 64

#: Slots of latencies in an event after the first one: the present slot and the one before.
LATEST_SLOTS = 2


class HoldingsSource(Protocol):
    """The instances, as far as the live page needs them."""

    def __iter__(self) -> Iterator[InstanceInfo]: ...

    async def call(self, instance_id: str, request: ListHoldings) -> Holdings: ...


class RequestNumbers:
    """Numbers of requests, which keep events short. They are ascending and never reused.

    Attributes:
        last: The latest number.
    """

    def __init__(self) -> None:
        self.last = 0
        self._numbers: dict[str, int] = {}

    def of(self, request_id: str) -> int:
        if (number := self._numbers.get(request_id)) is None:
            self.last += 1
            number = self._numbers[request_id] = self.last
        return number

    def since(self, last: int) -> dict[int, str]:
        """Ids of the requests with a number above `last`."""
        return {number: request_id for request_id, number in self._numbers.items() if number > last}

    def keep(self, request_ids: Iterable[str]) -> None:
        """Forgets all other requests."""
        kept = set(request_ids)
        self._numbers = {name: number for name, number in self._numbers.items() if name in kept}


def latest(moves: Sequence[Move]) -> list[Move]:
    """At most `MAX_MOVES`, in order; hand-offs are left out before others, of which there are fewer."""
    others = [move for move in moves if move.record.reason != "handoff"][-MAX_MOVES:]
    handoffs = [move for move in moves if move.record.reason == "handoff"]
    kept = others + handoffs[len(handoffs) - max(0, min(len(handoffs), MAX_MOVES - len(others))) :]
    return sorted(kept, key=lambda move: move.number)


class LiveView:
    """The data of one API server.

    Args:
        server: Name of the API server.
        snapshot: Gives the body of `GET /cluster`.
        instances: Asked for the blocks of their requests.
        labels: `service` and `model_name`, for the head of the page.
        totals: Returns the requests of the cluster that run and that wait.
        pages_elsewhere: Returns the number of pages that are open at the other API servers.
        update: Brings `recent` up to date with what the other API servers have counted, before each event.
    """

    def __init__(
        self,
        server: str,
        snapshot: Callable[[], object],
        instances: HoldingsSource,
        recent: RecentEvents,
        labels: Mapping[str, str] | None = None,
        totals: Callable[[], tuple[int, int]] = lambda: (0, 0),
        pages_elsewhere: Callable[[], int] = lambda: 0,
        update: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._server = server
        self._labels = dict(labels or {})
        self._totals = totals
        self._pages_elsewhere = pages_elsewhere
        self._update_recent = update
        self._snapshot = snapshot
        self._instances = instances
        self._recent = recent
        self._holdings: dict[str, Holdings] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._asked_at = -INTERVAL_S
        self._tasks = BackgroundTasks()
        self._numbers = RequestNumbers()
        self.num_watchers = 0
        self._closed = False

    @property
    def is_full(self) -> bool:
        return self.num_watchers + self._pages_elsewhere() >= MAX_WATCHERS

    def open(self) -> None:
        """Begins to record the number of requests, so that a page that is opened later shows the past."""
        self._tasks.start(self._record_totals())

    async def _record_totals(self) -> None:
        while True:
            self._recent.load(*self._totals())
            await asyncio.sleep(SLOT_S / 2)

    async def close(self) -> None:
        """Ends all streams of events."""
        self._closed = True
        await self._tasks.cancel()

    async def events(self, has_ended: Callable[[], bool] = lambda: False) -> AsyncIterator[bytes]:
        """Events as JSON for one page, until `has_ended`."""
        self.num_watchers += 1
        named = 0
        seen = self._recent.last_move
        is_first = True
        try:
            while not (self._closed or has_ended()):
                await self._update()
                last = self._recent.last_move
                moves = [move for move in self._recent.moves if move.number > seen]
                event = self._event(moves, is_first=is_first)
                event["names"] = self._numbers.since(named)
                named, is_first = self._numbers.last, False
                seen = last
                yield msgspec.json.encode(event)
                await asyncio.sleep(INTERVAL_S)
        finally:
            self.num_watchers -= 1

    async def _update(self) -> None:
        """Asks all that have answered last time, unless another page has just done so."""
        now = self._recent.clock()
        if now - self._asked_at >= INTERVAL_S / 2:
            self._asked_at = now
            if self._update_recent is not None and "" not in self._asked:
                self._asked[""] = self._tasks.start(self._ask_api_servers(self._update_recent))
            for instance_id in (info.instance_id for info in self._instances):
                if instance_id not in self._asked:
                    self._asked[instance_id] = self._tasks.start(self._ask_one(instance_id))
        if self._asked:
            await asyncio.wait(list(self._asked.values()), timeout=PATIENCE_S)
        here = {info.instance_id for info in self._instances}
        self._holdings = {name: held for name, held in self._holdings.items() if name in here}
        shown = {held.request_id for h in self._holdings.values() for held in h.held}
        shown |= {request_id for h in self._holdings.values() for request_id, _, _ in h.leaving}
        self._numbers.keep(shown | {move.record.request_id for move in self._recent.moves})

    async def _ask_api_servers(self, update: Callable[[], Awaitable[None]]) -> None:
        try:
            await update()
        finally:
            del self._asked[""]

    async def _ask_one(self, instance_id: str) -> None:
        try:
            self._holdings[instance_id] = await self._instances.call(instance_id, ListHoldings())
        except (PdServeError, TimeoutError):
            self._holdings.pop(instance_id, None)  # it has died, or hangs
        finally:
            del self._asked[instance_id]

    def _event(self, moves: list[Move], *, is_first: bool) -> dict[str, object]:
        recent, number = self._recent, self._numbers.of
        now, slots = recent.clock(), recent.slots() if is_first else recent.slots(LATEST_SLOTS)
        shown = latest(moves)
        past = {"past_moves": [self._moved(m, now) for m in latest(recent.moves)]} if is_first else {}
        return past | {
            "server": self._server,
            "service": self._labels.get("service", ""),
            "model": self._labels.get("model_name", ""),
            "block_tokens": max((info.engine.block_tokens for info in self._instances), default=0),
            "cluster": self._snapshot(),
            "blocks": {
                name: [(number(h.request_id), h.blocks, int(h.arriving)) for h in holdings.held]
                for name, holdings in self._holdings.items()
            },
            "leaving": [
                (number(request_id), name, destination, reason)
                for name, holdings in self._holdings.items()
                for request_id, destination, reason in holdings.leaving
            ],
            "moves": [self._moved(move, now) for move in shown],
            "moves_left_out": len(moves) - len(shown),
            "outcomes": recent.outcomes(),
            "loads": [(s.number, s.running, s.waiting) for s in slots if s.running is not None],
            "latency": {
                "slot_s": SLOT_S,
                "now": round(now / SLOT_S, 3),
                "slots": [slot.row() for slot in slots],
                "summary": recent.summary(),
            },
        }

    def _moved(self, move: Move, now: float) -> dict[str, object]:
        record = move.record
        return {
            "request": self._numbers.of(record.request_id),
            "source": record.source,
            "destination": record.destination,
            "reason": record.reason,
            "committed": record.committed,
            "why": record.why,
            "blocks": record.blocks,
            "duration_s": round(record.duration_s, 4),
            "seconds_ago": round(now - move.ended_at, 2),
        }
