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


@dataclass(eq=False, slots=True)
class Chunk:
    """A slice of a job's block pairs, and the transfers that move it: one per memory kind."""

    pairs: slice
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
        waiting: Chunks to post.
        under_way: Chunks posted.
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
    waiting: deque[Chunk] = field(default_factory=deque)
    under_way: list[Chunk] = field(default_factory=list)

    def settle(self, future: asyncio.Future[None], error: PeerLostError | None = None) -> None:
        """Sets `done` or `quiet`. For the reader's thread."""
        with contextlib.suppress(RuntimeError):  # its event loop was closed meanwhile
            self.loop.call_soon_threadsafe(settle, future, error)
