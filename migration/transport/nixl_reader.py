"""The reading half of the NIXL transport: one thread that owns one agent.

NIXL's agents are not thread safe by default, and a one-sided read cannot be cancelled: releasing its handle
may leave the UCX operation running (`ucx_backend_req.h` of the NIXL sources: "it may not be enough to cancel
UCX request"). Hence this shape:

- All NIXL calls of the reading side happen in the reader's thread: no locks around NIXL, and two thread
  switches a read. The calls that can take long release the GIL.
- A read that failed or is overdue costs the connection to its peer, not the agent: its handles are released,
  the connection is closed, and its caller gets the error at once. Its blocks are quiet after `QUARANTINE_S`
  more, in which the agent is driven so that the connection ends. The other reads of this peer end with it;
  reads of other peers do not notice, and all memory stays registered.
- A cancelled read that does not end soon goes on without its caller, until its deadline.
- Only if NIXL cannot close a connection, the agent is destroyed, which ends everything for certain, and
  opened again when needed (a **reset**). Chunks of other peers are posted once more then.
- The agent has no progress thread. What is not polled does not move. While idle it is driven once a second:
  UCX accepts TCP connections in a thread of its own, and closes those that are left, as by a port scanner,
  only when it is driven. Each would keep a descriptor otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

from migration.errors import PeerLostError
from migration.transport.kv_transport import KvRegion
from migration.transport.nixl_agent import NixlFailure
from migration.transport.nixl_connections import ConnectedPeer, ConnectError, NixlConnections
from migration.transport.read_caller import CANCEL_GRACE_S
from migration.transport.read_job import Chunk, ReadJob

logger = logging.getLogger(__name__)

# A read moves in chunks (`read_job`), and the reads take turns: a long one cannot hold up a short one, and a
# cancelled one ends soon. Two are under way, so that the link has one while the other is taken off. Through
# shared memory a chunk ends in the call that posts it, and is a turn.
CHUNKS_UNDER_WAY = 2

# When nothing writes any more over a connection that was closed. A forced close drops what is in flight in
# some ms; a network card gives up its retries within a few seconds.
QUARANTINE_S = 5.0

# How long `close` waits for the thread, which may be in a call that does not return.
CLOSE_S = 2.0

# Polling: without sleep at first, as most reads end within this time, then with short sleeps.
SPIN_S = 300e-6
SHORT_SLEEP_S = 50e-6
LONG_SLEEP_S = 200e-6
LONG_AFTER_S = 5e-3
QUARANTINE_SLEEP_S = 2e-3

# While idle: the interval at which the agent is driven, and how often each time. UCX handles 16 connections
# at a time; a call without any takes 10 us.
IDLE_PROGRESS_S = 1.0
IDLE_TURNS = 32


class NixlReader:
    """Reads blocks of peers into the local regions.

    Args:
        name: Prefix of its agents' names; unique among all agents.
        regions: The local regions.
        on_failure: Called in the reader's thread if that ends with an unforeseen error. Nothing can be read
            after it.

    Raises:
        NixlFailure: The regions cannot be registered.
    """

    def __init__(
        self,
        name: str,
        regions: Sequence[KvRegion],
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._name = name
        self._on_failure = on_failure
        self._active: list[ReadJob] = []
        self._lingering: list[ReadJob] = []  # cancelled, with chunks under way
        self._quarantined: dict[ReadJob, float] = {}  # their connection is closed; until when
        self._inbox: list[ReadJob | str] = []  # reads to start, names of peers to forget
        self._closing = False
        self._wake = threading.Condition()
        self._connections = NixlConnections(name, regions)
        self._thread = threading.Thread(target=self._run, name=f"nixl-reader-{name}", daemon=True)
        self._thread.start()

    def submit(self, job: ReadJob) -> None:
        """Queues a read. Its futures are set within its deadline, and `QUARANTINE_S`, whatever happens.

        Raises:
            PeerLostError: The reader is closed.
        """
        self._send(job)

    def forget(self, peer: str) -> None:
        """Drops the connection to a peer. Its reads end with PeerLostError. Returns at once."""
        with contextlib.suppress(PeerLostError):
            self._send(peer)

    def close(self) -> None:
        """Ends all reads with PeerLostError, destroys the agent and ends the thread. Idempotent.

        Returns within `CLOSE_S`. A thread that is in a call which does not return ends with the process.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.error("the reader of %s does not end: a call of NIXL hangs", self._name)

    def _send(self, command: ReadJob | str) -> None:
        with self._wake:
            if self._closing:
                raise PeerLostError(f"the transport {self._name} is closed")
            self._inbox.append(command)
            self._wake.notify()

    # ---- From here on: the reader's thread ----

    def _run(self) -> None:
        try:
            self._read_until_closed()
        except BaseException as error:
            logger.exception("the reader of %s has failed", self._name)
            self._on_failure(error)
        finally:
            with self._wake:
                self._closing = True
                self._active += [job for job in self._inbox if isinstance(job, ReadJob)]
            self._reset()
            for job in list(self._active):
                self._end(job, PeerLostError(f"the transport {self._name} is closed"))

    def _read_until_closed(self) -> None:
        last_move = 0.0
        if self._connections.agent is not None:
            self._connections.agent.enter_thread()
        while True:
            with self._wake:
                is_idle = not (
                    self._inbox or self._active or self._lingering or self._quarantined or self._closing
                ) and not self._wake.wait(IDLE_PROGRESS_S)
                if self._closing:
                    return
                commands, self._inbox = self._inbox, []
            if is_idle:
                self._drive(IDLE_TURNS)
            for command in commands:
                self._take(command)
            moved = bool(commands)
            for job in list(self._active):
                moved |= self._advance(job)
            self._watch_ended()
            now = time.monotonic()
            if moved:
                last_move = now
            elif not self._active:
                with self._wake:
                    if not (self._inbox or self._closing):
                        self._wake.wait(QUARANTINE_SLEEP_S)
            elif now - last_move > SPIN_S:
                time.sleep(SHORT_SLEEP_S if now - last_move < LONG_AFTER_S else LONG_SLEEP_S)

    def _take(self, command: ReadJob | str) -> None:
        if isinstance(command, ReadJob):
            self._active.append(command)
            return
        self._drop_connection(command, "was given up")
        for job in [job for job in self._active if job.peer == command]:
            self._lose(job, "was given up")

    def _advance(self, job: ReadJob) -> bool:
        """Gives a job its turn: takes off what has ended, starts what may start. Returns if anything did."""
        if job not in self._active:  # another job's turn ended it
            return False
        try:
            moved = self._collect(job)
            now = time.monotonic()
            if job.cancelled.is_set():
                job.waiting.clear()
                job.cancelled_at = job.cancelled_at or now
            elif now < job.deadline:
                while job.waiting and len(job.under_way) < CHUNKS_UNDER_WAY:
                    moved = True
                    if not self._post(job):
                        break
        except ConnectError as error:
            self._lose(job, str(error))
            return True
        except NixlFailure as failure:
            self._lose(job, str(failure))
            return True
        if not job.waiting and not job.under_way:
            self._end(job, None)
            return True
        if now >= job.deadline:
            self._lose(job, "took too long to answer")
            return True
        if job.cancelled_at is not None and now >= job.cancelled_at + CANCEL_GRACE_S:
            self._lingering.append(job)
            self._end(job, PeerLostError(f"KV read from {job.peer}: was cancelled"))
            return True
        return moved

    def _watch_ended(self) -> None:
        """Looks after reads that may still write though their callers have gone."""
        now = time.monotonic()
        for job in list(self._lingering):
            if job not in self._lingering:  # another job's turn ended it
                continue
            try:
                self._collect(job)
            except NixlFailure as failure:
                self._lose(job, str(failure))
                continue
            if not job.under_way:
                self._lingering.remove(job)
                job.settle(job.quiet)
            elif now >= job.deadline:
                self._lose(job, "took too long to answer")
        for job in [job for job, until in self._quarantined.items() if now >= until]:
            del self._quarantined[job]
            job.settle(job.quiet)
        if self._quarantined:
            self._drive(1)

    def _drive(self, turns: int) -> None:
        try:
            for _ in range(turns):
                if self._connections.agent is not None:
                    self._connections.agent.progress()
        except NixlFailure:
            self._reset()

    def _post(self, job: ReadJob) -> bool:
        """Starts a job's next chunk. Returns whether it is under way: through shared memory it has ended."""
        peer = self._connect(job)
        agent = self._connections.agent
        assert agent is not None
        chunk, cpu_began = job.next_chunk(time.monotonic()), time.thread_time()
        for kind, remote in peer.remote.items():
            local = peer.local[kind]
            handle = agent.read(
                local.handle,
                local.indices(job.local_blocks[chunk.pairs]),
                remote.handle,
                remote.indices(job.remote_blocks[chunk.pairs]),
            )
            if handle is not None:
                chunk.handles.append(handle)
        if not chunk.handles:
            # The CPU time of the copy, which has no waits for the GIL or a core.
            job.chunk_ended(chunk, time.monotonic(), time.thread_time() - cpu_began)
        return bool(chunk.handles)

    def _collect(self, job: ReadJob) -> bool:
        """Takes the ended chunks of a job off its list. Returns whether there were any."""
        ended = [chunk for chunk in job.under_way if self._has_ended(chunk)]
        for chunk in ended:
            job.chunk_ended(chunk, time.monotonic())
        return bool(ended)

    def _has_ended(self, chunk: Chunk) -> bool:
        agent = self._connections.agent
        assert agent is not None
        while chunk.handles:
            if not agent.is_done(chunk.handles[-1]):
                return False
            agent.release(chunk.handles.pop())
        return True

    def _lose(self, job: ReadJob, why: str) -> None:
        """Ends a job with PeerLostError, and the connection that it reads over if it may still do that."""
        if job.under_way:
            self._drop_connection(job.peer, why)
        else:
            self._end(job, PeerLostError(f"KV read from {job.peer}: {why}"))

    def _drop_connection(self, name: str, why: str) -> None:
        """Closes the connection to a peer. Its reads end; what they may still write to is in quarantine."""
        until = time.monotonic() + QUARANTINE_S
        lost = [job for job in (*self._active, *self._lingering) if job.peer == name and job.under_way]
        for job in lost:
            self._release(job)
            job.under_way.clear()
            self._quarantined[job] = until
            if job in self._active:
                self._end(job, PeerLostError(f"KV read from {name}: {why}"))
            else:
                self._lingering.remove(job)
        if lost:
            logger.warning("the connection to %s is closed, %d reads end: %s", name, len(lost), why)
        try:
            self._connections.disconnect(name)
        except NixlFailure:
            self._reset()

    def _end(self, job: ReadJob, error: PeerLostError | None) -> None:
        self._active.remove(job)
        if job not in self._lingering and job not in self._quarantined:
            job.settle(job.quiet)
        job.settle(job.done, error)

    def _connect(self, job: ReadJob) -> ConnectedPeer:
        """The connection for a job, made if necessary. Raises: ConnectError."""
        known = self._connections.peers.get(job.peer)
        if known is not None and known.path == job.path:
            return known
        if known is not None:
            self._drop_connection(job.peer, "was started anew")
            for other in [j for j in self._active if j.peer == job.peer and j.path == known.path]:
                self._lose(other, "was started anew")
        return self._connections.connect(job.peer, job.path)

    def _release(self, job: ReadJob) -> None:
        """Frees the handles of a job's chunks under way."""
        agent = self._connections.agent
        for chunk in job.under_way:
            while chunk.handles:
                handle = chunk.handles.pop()
                with contextlib.suppress(NixlFailure):
                    if agent is not None:
                        agent.release(handle)

    def _reset(self) -> None:
        """Destroys the agent, and with it all transfers; what was under way waits to be posted again."""
        for job in (*self._active, *self._lingering):
            self._release(job)
            job.put_back()
        self._connections.close()
        ended = [*self._lingering, *self._quarantined]
        self._lingering.clear()
        self._quarantined.clear()
        for job in ended:
            job.settle(job.quiet)
