"""One read of a NIXL transport, on its way through the reader's thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field

from migration.errors import PeerLostError
from migration.tasks import settle
from migration.transport.nixl_agent import Indices
from migration.transport.nixl_connections import ReadPath

# A chunk is to take this long, in seconds, if that is more than the least bytes. Beside a busy step thread it
# costs a turn of the GIL, which is up to a switch interval: see `bench links`.
CHUNK_S = 2e-3
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4 << 20, 64 << 20

# What a chunk may be of the one before: one that was held up says little about the link.
MAX_GROWTH = 2.0


@dataclass(eq=False, slots=True)
class Chunk:
    """A slice of a job's block pairs, and the transfers that move it: one per memory kind.

    Attributes:
        posted_at: On `time.monotonic()`.
    """

    pairs: slice
    posted_at: float
    handles: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class ReadJob:
    """One call of `read`. `cancelled` is set from the event loop's thread; all else belongs to the reader's.

    Attributes:
        path: What is read of each block, and where it goes.
        block_bytes: Of one block, how much is read.
        remote_blocks: Read these ...
        local_blocks: ... into these.
        deadline: On `time.monotonic()`.
        done: Belongs to `loop`. Gets None or PeerLostError.
        quiet: Belongs to `loop`. Gets None when nothing writes to the local blocks any more: before `done`;
            if it fails, perhaps later.
        cancelled_at: When the reader noticed that the read was cancelled.
        waiting: Slices of the block pairs that are not posted yet, in order.
        under_way: Chunks posted.
        chunk_bytes: About as much as the link moves in `CHUNK_S`, within bounds.
    """

    peer: str
    path: ReadPath
    block_bytes: int
    remote_blocks: Indices
    local_blocks: Indices
    deadline: float
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    quiet: asyncio.Future[None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    cancelled_at: float | None = None
    waiting: deque[slice] = field(init=False)
    under_way: list[Chunk] = field(default_factory=list)
    chunk_bytes: float = field(default_factory=lambda: MIN_CHUNK_BYTES)
    _last_end: float = 0.0

    def __post_init__(self) -> None:
        self.waiting = deque([slice(0, len(self.local_blocks))])

    def next_chunk(self, now: float) -> Chunk:
        """Moves the next chunk from `waiting` to `under_way`."""
        rest = self.waiting.popleft()
        end = rest.start + max(1, int(self.chunk_bytes) // max(1, self.block_bytes))
        if end < rest.stop:
            self.waiting.appendleft(slice(end, rest.stop))
        chunk = Chunk(slice(rest.start, min(end, rest.stop)), now)
        self.under_way.append(chunk)
        return chunk

    def chunk_ended(self, chunk: Chunk, now: float, took_s: float | None = None) -> None:
        """Takes a chunk off `under_way`. Its time gives the size of the next one.

        Args:
            took_s: None for the time since it was posted, without that behind other chunks.
        """
        self.under_way.remove(chunk)
        if took_s is None:
            took_s = now - max(chunk.posted_at, self._last_end)
        self._last_end = now
        moved = (chunk.pairs.stop - chunk.pairs.start) * self.block_bytes
        least, most = self.chunk_bytes / MAX_GROWTH, self.chunk_bytes * MAX_GROWTH
        size = min(max(moved / max(took_s, 1e-6) * CHUNK_S, least), most)
        self.chunk_bytes = min(max(size, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)

    def put_back(self) -> None:
        """What is under way has to be posted once more."""
        self.waiting.extendleft(chunk.pairs for chunk in reversed(self.under_way))
        self.under_way.clear()

    def settle(self, future: asyncio.Future[None], error: PeerLostError | None = None) -> None:
        """Sets `done` or `quiet`. For the reader's thread."""
        with contextlib.suppress(RuntimeError):  # its event loop was closed meanwhile
            self.loop.call_soon_threadsafe(settle, future, error)
