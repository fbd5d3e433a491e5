"""The cluster as the live page gets it: one event about twice a second, while somebody watches.

Nobody keeps a subscription: each event is what makes instances be asked for the blocks that their requests
hold, so that they are asked nothing when the last watcher is gone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import msgspec

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import Holdings, InstanceInfo
from pd_serve.dashboard.recent import SLOT_S, Move, RecentEvents
from pd_serve.errors import PdServeError

#: Time from one event to the next, and how long one waits for instances in the middle of a step.
INTERVAL_S = 0.5
PATIENCE_S = 0.15

#: Pages that may be open at a time, at one API server.
MAX_WATCHERS = 16

#: Moves in one event; of more than that the latest.
MAX_MOVES = 64

#: Slots of latencies in an event that is not the first: the present one, and the one that has just ended.
LATEST_SLOTS = 2


class Instances(Protocol):
    """The part of `InstanceDirectory` that is needed here."""

    def __iter__(self) -> Iterator[InstanceInfo]: ...

    async def ask(self, instance_id: str, method: str) -> Any: ...


class LiveView:
    """One API server's view.

    Args:
        server: Its name.
        snapshot: Body of `GET /cluster`.
        instances: Those that can be asked.
    """

    def __init__(
        self,
        server: str,
        snapshot: Callable[[], dict[str, Any]],
        instances: Instances,
        recent: RecentEvents,
    ) -> None:
        self._server = server
        self._snapshot = snapshot
        self._instances = instances
        self._recent = recent
        self._holdings: dict[str, Holdings] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._asked_at = -INTERVAL_S
        self._tasks = BackgroundTasks()
        self._numbers: dict[str, int] = {}  # of requests, for short events; ascending
        self._num_numbers = 0
        self.num_watchers = 0
        self._closed = False

    @property
    def is_full(self) -> bool:
        return self.num_watchers >= MAX_WATCHERS

    async def close(self) -> None:
        """Ends the events, too."""
        self._closed = True
        await self._tasks.cancel()

    async def events(self, has_ended: Callable[[], bool] = lambda: False) -> AsyncIterator[bytes]:
        """JSON for one watcher until `has_ended`, or for as long as they are taken."""
        self.num_watchers += 1
        named = 0
        seen = self._recent.moves[-1].number if self._recent.moves else 0
        is_first = True
        try:
            while not (self._closed or has_ended()):
                await self._look()
                moves = [move for move in self._recent.moves if move.number > seen]
                event = self._event(moves, is_first=is_first)
                event["names"] = {number: name for name, number in self._numbers.items() if number > named}
                named, is_first = self._num_numbers, False
                seen = moves[-1].number if moves else seen
                yield msgspec.json.encode(event)
                await asyncio.sleep(INTERVAL_S)
        finally:
            self.num_watchers -= 1

    async def _look(self) -> None:
        """Asks the instances that have answered the last time, unless another watcher has just done so."""
        now = self._recent.clock()
        if now - self._asked_at >= INTERVAL_S / 2:
            self._asked_at = now
            for instance_id in (info.instance_id for info in self._instances):
                if instance_id not in self._asked:
                    self._asked[instance_id] = self._tasks.start(self._ask_one(instance_id))
        if self._asked:
            await asyncio.wait(list(self._asked.values()), timeout=PATIENCE_S)

    async def _ask_one(self, instance_id: str) -> None:
        try:
            self._holdings[instance_id] = msgspec.convert(
                await self._instances.ask(instance_id, "holdings"), Holdings
            )
        except (PdServeError, TimeoutError):
            self._holdings.pop(instance_id, None)  # it has died, or hangs
        finally:
            del self._asked[instance_id]

    def _event(self, moves: list[Move], *, is_first: bool) -> dict[str, Any]:
        recent, here = self._recent, {info.instance_id: info for info in self._instances}
        self._holdings = {name: held for name, held in self._holdings.items() if name in here}
        self._renumber()
        now, slots = recent.clock(), recent.slots() if is_first else recent.slots(LATEST_SLOTS)
        return {
            "server": self._server,
            "block_tokens": max((info.block_tokens for info in here.values()), default=0),
            "cluster": self._snapshot(),
            "blocks": {
                name: [(self._number(h.request_id), h.blocks, int(h.arriving)) for h in holdings.held]
                for name, holdings in self._holdings.items()
            },
            "leaving": [
                (self._number(request_id), name, destination, reason)
                for name, holdings in self._holdings.items()
                for request_id, destination, reason in holdings.leaving
            ],
            "moves": [
                {
                    "request": self._number(move.record.request_id),
                    "source": move.record.source,
                    "destination": move.record.destination,
                    "reason": move.record.reason,
                    "committed": move.record.committed,
                    "why": move.record.why,
                    "blocks": move.record.blocks,
                    "duration_s": round(move.record.duration_s, 4),
                    "seconds_ago": round(now - move.ended_at, 2),
                }
                for move in moves[-MAX_MOVES:]
            ],
            "moves_left_out": max(0, len(moves) - MAX_MOVES),
            "latency": {
                "slot_s": SLOT_S,
                "now": round(now / SLOT_S, 3),
                "slots": [slot.row() for slot in slots],
                "summary": recent.summary(),
            },
        }

    def _number(self, request_id: str) -> int:
        if (number := self._numbers.get(request_id)) is None:
            self._num_numbers += 1
            number = self._numbers[request_id] = self._num_numbers
        return number

    def _renumber(self) -> None:
        """Forgets the numbers of requests that no event will speak of again."""
        spoken_of: set[str] = {held.request_id for h in self._holdings.values() for held in h.held}
        spoken_of |= {request_id for h in self._holdings.values() for request_id, _, _ in h.leaving}
        spoken_of |= {move.record.request_id for move in self._recent.moves}
        for request_id in [name for name in self._numbers if name not in spoken_of]:
            del self._numbers[request_id]
