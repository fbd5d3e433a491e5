"""Recent events for the live page: latencies, load and errors of the last minutes, and finished migrations.

Latencies are counted in slots of a few seconds, each a histogram with geometric buckets: counting a token
takes a logarithm and an addition, and quantiles are accurate to a few percent.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from migration.record import MigrationRecord
from pd_serve.comm.requests import CountedSlot
from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import Timeline

#: Length of a slot, number of slots kept, and number of slots in the summary.
SLOT_S = 5.0
NUM_SLOTS = 60
NUM_SUMMED = 12

#: What a slot counts, apart from its histograms.
COUNTS = ("tokens", "ended", "errors")

#: Ratio of the bounds of a bucket.
GROWTH = 1.05
_LOG_GROWTH = math.log(GROWTH)

#: Hand-offs that are kept, and other migrations, which would otherwise be lost among them.
NUM_MOVES = 256


def bucket_of(seconds: float) -> int:
    return math.floor(math.log(max(seconds, 1e-6)) / _LOG_GROWTH)


def quantile(counts: Mapping[int, int], share: float) -> float | None:
    """A quantile of bucketed values in seconds; None without values."""
    left = math.ceil(share * sum(counts.values()))
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            return float(f"{GROWTH ** (bucket + 0.5):.4g}")
    return None


@dataclass(slots=True)
class Slot:
    """One slot, which began at `number` times `SLOT_S`.

    Attributes:
        ended, errors: Requests that have ended, and those of them that failed.
        running, waiting: Requests of the whole cluster at one moment of the slot; None if it was not looked.
    """

    number: int
    first_tokens: Counter[int] = field(default_factory=Counter)
    gaps: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    ended: int = 0
    errors: int = 0
    running: int | None = None
    waiting: int | None = None

    @classmethod
    def of(cls, counted: CountedSlot) -> "Slot":
        """What another API server has counted."""
        first_tokens, gaps = Counter(counted.first_tokens), Counter(counted.gaps)
        slot = cls(counted.number, first_tokens, gaps)
        for name in COUNTS:
            setattr(slot, name, getattr(counted, name))
        return slot

    def counted(self) -> CountedSlot:
        counts = {name: getattr(self, name) for name in COUNTS}
        return CountedSlot(self.number, dict(self.first_tokens), dict(self.gaps), **counts)

    def plus(self, other: "Slot") -> "Slot":
        """The requests of both; running and waiting ones are those of the whole cluster already."""
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        first_tokens, gaps = self.first_tokens + other.first_tokens, self.gaps + other.gaps
        return Slot(self.number, first_tokens, gaps, **counts, running=self.running, waiting=self.waiting)

    def row(self) -> tuple[int, int, float | None, float | None, float | None, float | None]:
        """Number of the slot, tokens, P50 and P99 of TTFT, P50 and P99 of ITL in seconds."""
        ttft, itl = self.first_tokens, self.gaps
        return (
            self.number,
            self.tokens,
            *(quantile(ttft, 0.5), quantile(ttft, 0.99)),
            *(quantile(itl, 0.5), quantile(itl, 0.99)),
        )


class Move(NamedTuple):
    """A finished migration.

    Attributes:
        number: Ascending.
        ended_at: Time of the clock.
    """

    number: int
    ended_at: float
    record: MigrationRecord


class RecentEvents(Observer):
    """Of one API server, and what others have counted.

    Args:
        clock: Time in seconds, which is the same at all API servers and is not set back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._handoffs: deque[Move] = deque(maxlen=NUM_MOVES)
        self._other_moves: deque[Move] = deque(maxlen=NUM_MOVES)
        self._num_moves = 0
        self._slots: deque[Slot] = deque(maxlen=NUM_SLOTS)
        self._elsewhere: dict[str, dict[int, Slot]] = {}

    def first_token(self, request: Timeline) -> None:
        assert request.first_token_at is not None
        slot = self._slot()
        slot.first_tokens[bucket_of(request.first_token_at - request.issued_at)] += 1
        slot.tokens += 1

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        slot = self._slot()
        for gap_s, count in gaps.items():
            slot.gaps[bucket_of(gap_s)] += count
            slot.tokens += count

    def migration_ended(self, record: MigrationRecord) -> None:
        self._num_moves += 1
        moves = self._handoffs if record.reason == "handoff" else self._other_moves
        moves.append(Move(self._num_moves, self.clock(), record))

    def ended(self, request: Timeline) -> None:
        slot = self._slot()
        slot.ended += 1
        slot.errors += request.outcome == "error"

    def load(self, running: int, waiting: int) -> None:
        """Takes the number of requests in the cluster."""
        slot = self._slot()
        slot.running, slot.waiting = running, waiting

    @property
    def moves(self) -> list[Move]:
        """Finished migrations, oldest first."""
        return sorted([*self._handoffs, *self._other_moves], key=lambda move: move.number)

    @property
    def last_move(self) -> int:
        """Number of the latest finished migration; 0 before the first one."""
        return self._num_moves

    def counted(self, since: int) -> list[CountedSlot]:
        """What this API server itself has counted, from a slot on."""
        return [slot.counted() for slot in self._slots if slot.number >= since]

    def next_of(self, api_server: str) -> int:
        """The first slot of another API server that is not known, or may have changed since."""
        return max(self._elsewhere.get(api_server, ()), default=0)

    def note_elsewhere(self, api_server: str, slots: Iterable[CountedSlot]) -> None:
        """Takes what another API server has counted. What one has that has died since is kept."""
        begin = self._now() - NUM_SLOTS
        self._elsewhere.setdefault(api_server, {}).update({slot.number: Slot.of(slot) for slot in slots})
        kept = {
            name: {n: s for n, s in known.items() if n > begin} for name, known in self._elsewhere.items()
        }
        self._elsewhere = {name: known for name, known in kept.items() if known}

    def slots(self, last: int = NUM_SLOTS) -> list[Slot]:
        """The latest slots of all API servers that are not empty, oldest first."""
        begin = self._now() - last
        found = {slot.number: slot for slot in self._slots if slot.number > begin}
        for known in self._elsewhere.values():
            for number, slot in known.items():
                if number > begin:
                    found[number] = found.get(number, Slot(number)).plus(slot)
        return [found[number] for number in sorted(found)]

    def summary(self) -> dict[str, float | None]:
        """Quantiles in seconds, and tokens/s, over the last `NUM_SUMMED` slots."""
        slots = self.slots(NUM_SUMMED)
        ttft = sum((slot.first_tokens for slot in slots), Counter[int]())
        itl = sum((slot.gaps for slot in slots), Counter[int]())
        seconds = (NUM_SUMMED - 1) * SLOT_S + self.clock() % SLOT_S
        return {
            "ttft_p50": quantile(ttft, 0.5),
            "ttft_p99": quantile(ttft, 0.99),
            "itl_p50": quantile(itl, 0.5),
            "itl_p99": quantile(itl, 0.99),
            "tokens_per_s": round(sum(slot.tokens for slot in slots) / seconds, 1),
        }

    def outcomes(self) -> dict[str, int]:
        """Requests that have ended in the last `NUM_SUMMED` slots, and those of them that failed."""
        slots = self.slots(NUM_SUMMED)
        return {"ended": sum(s.ended for s in slots), "errors": sum(s.errors for s in slots)}

    def _slot(self) -> Slot:
        now = self._now()
        if not self._slots or self._slots[-1].number != now:
            self._slots.append(Slot(now))
        return self._slots[-1]

    def _now(self) -> int:
        return int(self.clock() // SLOT_S)
