"""The reading half of the NIXL transport: one thread that owns one agent.

NIXL's agents are not thread safe by default, and a one-sided read cannot be cancelled: releasing its handle
leaves the UCX operation running (`ucx_backend_req.h` of the NIXL sources: "it may not be enough to cancel UCX
request"). Only destroying the agent ends it for certain. Hence this shape:

- All NIXL calls of the reading side happen in the reader's thread: no locks around NIXL, and two thread
  switches a read. The calls that can take long release the GIL.
- A read that failed, or is overdue, ends by a **reset**: the agent is destroyed (3-7 ms measured, with a
  stalled peer too) and opened again when needed. Only then does its caller get the error, so that nothing
  writes to its blocks any more. Reads of other peers go on: their chunks under way are posted once more.
- The agent has no progress thread. What is not polled does not move, and an idle reader costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from migration.errors import PeerLostError
from migration.tasks import settle
from migration.transport.kv_transport import KvRegion
from migration.transport.nixl_agent import Indices, NixlFailure
from migration.transport.nixl_connections import ConnectedPeer, ConnectError, NixlConnections

# A read moves in chunks, two of them under way, and the reads take turns: a long one cannot hold up a short
# one, and a cancelled one ends soon. Through shared memory 4 MiB take about 0.7 ms.
CHUNK_BYTES = 4 << 20
CHUNKS_UNDER_WAY = 2

# How long the chunks under way of a cancelled read may take before they cost a reset.
CANCEL_GRACE_S = 0.5

# Polling: without sleep at first, as most reads end within this time, then with short sleeps.
SPIN_S = 300e-6
SHORT_SLEEP_S = 50e-6
LONG_SLEEP_S = 200e-6
LONG_AFTER_S = 5e-3


@dataclass(eq=False, slots=True)
class _Chunk:
    """A slice of a job's block pairs, and the transfers that move it: one per memory kind."""

    pairs: slice
    handles: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class ReadJob:
    """One call of `read`. `cancelled` is set from the event loop's thread; all else belongs to the reader's.

    Attributes:
        metadata: The peer agent's, from its endpoint.
        remote_regions: The peer's, in the order of the local ones.
        remote_blocks: Read these ...
        local_blocks: ... into these.
        deadline: On `time.monotonic()`.
        done: Belongs to `loop`. Gets None or PeerLostError.
        waiting: Chunks to post.
        under_way: Chunks posted.
    """

    peer: str
    metadata: bytes
    remote_regions: Sequence[KvRegion]
    remote_blocks: Indices
    local_blocks: Indices
    deadline: float
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiting: deque[_Chunk] = field(default_factory=deque)
    under_way: list[_Chunk] = field(default_factory=list)


class NixlReader:
    """Reads blocks of peers into the local regions.

    Args:
        name: Prefix of its agents' names; unique among all agents.
        regions: The local regions.

    Raises:
        NixlFailure: They cannot be registered.
    """

    def __init__(self, name: str, regions: Sequence[KvRegion]) -> None:
        self._name = name
        self._block_bytes = sum(region.block_bytes for region in regions)
        self._active: list[ReadJob] = []
        self._inbox: list[ReadJob | str] = []  # reads to start, names of peers to forget
        self._closing = False
        self._wake = threading.Condition()
        self._connections = NixlConnections(name, regions)
        self._thread = threading.Thread(target=self._run, name=f"nixl-reader-{name}", daemon=True)
        self._thread.start()

    def submit(self, job: ReadJob) -> None:
        """Queues a read. Its future is set within its deadline and the time of a reset, whatever happens.

        Raises:
            PeerLostError: The reader is closed.
        """
        self._send(job)

    def forget(self, peer: str) -> None:
        """Drops the connection to a peer. Its reads end with PeerLostError. Returns at once."""
        with contextlib.suppress(PeerLostError):
            self._send(peer)

    def close(self) -> None:
        """Ends all reads with PeerLostError, destroys the agent and joins the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _send(self, command: ReadJob | str) -> None:
        with self._wake:
            if self._closing:
                raise PeerLostError(f"the transport {self._name} is closed")
            self._inbox.append(command)
            self._wake.notify()

    # ---- From here on: the reader's thread ----

    def _run(self) -> None:
        last_move = 0.0
        try:
            if self._connections.agent is not None:
                self._connections.agent.enter_thread()
            while True:
                with self._wake:
                    while not (self._inbox or self._active or self._closing):
                        self._wake.wait()
                    if self._closing:
                        return
                    commands, self._inbox = self._inbox, []
                for command in commands:
                    self._take(command)
                moved = bool(commands)
                for job in list(self._active):
                    moved |= self._advance(job)
                now = time.monotonic()
                if moved:
                    last_move = now
                elif now - last_move > SPIN_S:
                    time.sleep(SHORT_SLEEP_S if now - last_move < LONG_AFTER_S else LONG_SLEEP_S)
        finally:
            with self._wake:
                self._closing = True
                self._active += [job for job in self._inbox if isinstance(job, ReadJob)]
            self._reset()
            for job in list(self._active):
                self._end(job, PeerLostError(f"the transport {self._name} is closed"))

    def _take(self, command: ReadJob | str) -> None:
        if isinstance(command, ReadJob):
            size = max(1, CHUNK_BYTES // max(1, self._block_bytes))
            starts = range(0, len(command.local_blocks), size)
            command.waiting.extend(_Chunk(slice(start, start + size)) for start in starts)
            self._active.append(command)
            return
        for job in [job for job in self._active if job.peer == command]:
            self._lose(job, "was given up")
        self._disconnect(command)

    def _advance(self, job: ReadJob) -> bool:
        """Gives a job its turn: takes off what has ended, starts what may start. Returns if anything did."""
        if job not in self._active:  # another job's turn ended it
            return False
        try:
            moved = self._collect(job)
            now = time.monotonic()
            if job.cancelled.is_set():
                job.waiting.clear()
                job.deadline = min(job.deadline, now + CANCEL_GRACE_S)
            elif now < job.deadline:
                for _ in range(min(CHUNKS_UNDER_WAY - len(job.under_way), len(job.waiting))):
                    self._post(job)
                    moved = True
        except ConnectError as error:
            self._lose(job, str(error))
            return True
        except NixlFailure as failure:
            self._reset()  # part of it may still be under way, though its handle is gone
            self._lose(job, str(failure))
            return True
        if not job.waiting and not job.under_way:
            self._end(job, None)
            return True
        if now >= job.deadline:
            self._lose(job, "took too long to answer")
            return True
        return moved

    def _post(self, job: ReadJob) -> None:
        """Starts a job's next chunk. Small reads through shared memory have ended after this."""
        peer = self._connect(job)
        agent, local_blocks = self._connections.agent, self._connections.local
        assert agent is not None
        chunk = job.waiting.popleft()
        job.under_way.append(chunk)
        for kind, remote in peer.blocks.items():
            local = local_blocks[kind]
            handle = agent.read(
                local.handle,
                local.indices(job.local_blocks[chunk.pairs]),
                remote.handle,
                remote.indices(job.remote_blocks[chunk.pairs]),
            )
            if handle is not None:
                chunk.handles.append(handle)
        if not chunk.handles:
            job.under_way.remove(chunk)

    def _collect(self, job: ReadJob) -> bool:
        """Takes the ended chunks of a job off its list. Returns whether there were any."""
        ended = [chunk for chunk in job.under_way if self._has_ended(chunk)]
        for chunk in ended:
            job.under_way.remove(chunk)
        return bool(ended)

    def _has_ended(self, chunk: _Chunk) -> bool:
        agent = self._connections.agent
        assert agent is not None
        while chunk.handles:
            if not agent.is_done(chunk.handles[-1]):
                return False
            agent.release(chunk.handles.pop())
        return True

    def _lose(self, job: ReadJob, why: str) -> None:
        """Ends a job with PeerLostError, when nothing writes to its blocks any more."""
        if job.under_way:
            self._reset()
        self._end(job, PeerLostError(f"KV read from {job.peer}: {why}"))

    def _end(self, job: ReadJob, error: PeerLostError | None) -> None:
        self._active.remove(job)
        with contextlib.suppress(RuntimeError):  # its event loop was closed meanwhile
            job.loop.call_soon_threadsafe(settle, job.done, error)

    def _connect(self, job: ReadJob) -> ConnectedPeer:
        """The connection for a job, made if necessary. Raises: ConnectError."""
        known = self._connections.peers.get(job.peer)
        if known is not None and known.metadata == job.metadata:
            return known
        if known is not None:  # the peer was started anew
            for other in [j for j in self._active if j.peer == job.peer and j.metadata != job.metadata]:
                self._lose(other, "was started anew")
            self._disconnect(job.peer)
        return self._connections.connect(job.peer, job.metadata, job.remote_regions)

    def _disconnect(self, name: str) -> None:
        try:
            self._connections.disconnect(name)
        except NixlFailure:
            self._reset()

    def _reset(self) -> None:
        """Destroys the agent, and with it all transfers; what was under way waits to be posted again."""
        agent = self._connections.agent
        for job in self._active:
            job.waiting.extendleft(reversed(job.under_way))
            for chunk in job.under_way:
                while chunk.handles:
                    handle = chunk.handles.pop()
                    with contextlib.suppress(NixlFailure):
                        if agent is not None:
                            agent.release(handle)
            job.under_way.clear()
        self._connections.close()
