"""`NixlTransport`: KV blocks through NIXL, from shared memory on one machine to RDMA and NVLink.

Two agents an instance. The serving one holds the registered memory that peers read; it has a native
progress thread. The reading one lives in `nixl_reader`, apart, so that what happens to failed reads does not
disturb the peers that read from here.

What was found on one machine (NIXL 1.5.1, two cores, UCX_TLS unset; GPU memory was not tried):
- With process_vm_readv allowed UCX reads through it ("cma") at 5 GB/s, one block of 1 MiB over 16 regions in
  0.4 ms. The source takes no part, be it busy or stopped. Only the wire-up (first read of a peer: 10 ms)
  needs the source's progress thread; without one the first read never ends.
- Where it is denied, and between machines without RDMA, reads are emulated: the source's progress thread
  answers them, without the GIL, so a busy Python does not matter. 1.2-1.6 GB/s, the block in 1 ms.
- In the reading process each read takes some seven turns of the GIL. A thread busy in Python itself (numpy
  and torch calls give it up) makes each wait for `sys.getswitchinterval()`: the block took 37 ms at the
  default of 5 ms, 2.5 ms at 0.2 ms.
- Idle, both agents together use less than 0.1 % of a core (the progress thread sleeps on a descriptor). An
  agent takes 5 MB and 20 ms.
- All shared memory UCX takes is System V segments marked for removal and unlinked files: the kernel frees it
  with the process, however that ends (SIGKILL tried), so there is nothing to clean up after a crash.
- A limit of UCX: a source that was frozen for longer than its reader's bound aborts when it wakes, if reads
  from it are emulated ("Fatal: unexpected error: Endpoint timeout"): it answers a connection that is gone.
  A reader that dies in mid read did it no harm (42 kills).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from migration.errors import PdServeError, PeerLostError
from migration.transport.head_slices import common_heads, paired_rows
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.nixl_agent import NixlAgent, NixlFailure, memory_kind
from migration.transport.nixl_connections import ReadPath
from migration.transport.nixl_reader import NixlReader
from migration.transport.read_caller import ReadCaller
from migration.transport.read_job import ReadJob

#: Python's switch interval in a process that reads, in seconds: see above.
SWITCH_INTERVAL_S = 0.0005

#: Indices of NIXL have 32 bits.
MAX_ROWS = (1 << 31) - 1


class _NixlEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to read from an instance.

    Attributes:
        metadata: Of the serving agent: addresses and remote keys.
        regions: In the order all instances share.
    """

    metadata: bytes
    regions: list[KvRegion]


@dataclass(frozen=True, slots=True)
class _Source:
    """What a peer's endpoint means here.

    Attributes:
        block_bytes: Of one block, how much is read.
        limits: Blocks of the peer, and here.
    """

    endpoint: bytes
    heads: KvHeads | None
    path: ReadPath
    block_bytes: int
    limits: list[int]


class NixlTransport:
    """The real `KvTransport`.

    Args:
        name: The instance's id. Agents get names that are unique also across restarts of it.
        timeout_s: Bound of one `read`, on the wall clock.
        on_failure: Called, in any thread, when the reader has ended or hangs. Nothing can be read any more
            then, and nothing is known of the blocks that it was writing to. It has to end the process.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float = 30.0,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._caller = ReadCaller(f"the reader of {name}", timeout_s, on_failure)
        self.quarantine = self._caller.quarantine
        self._name = name
        self._on_failure = on_failure
        self._timeout_s = timeout_s
        self._regions: tuple[KvRegion, ...] = ()
        self._server: NixlAgent | None = None
        self._reader: NixlReader | None = None
        self._endpoint = b""
        self._sources: dict[str, _Source] = {}

    def register(self, regions: Sequence[KvRegion]) -> None:
        """Makes the regions readable by peers and writable by `read`. The caller keeps the memory alive.

        Loads NIXL and starts both agents: 0.5 s the first time in a process that has torch, then 40 ms.

        Raises:
            ValueError: There are no regions, or some are registered already.
            PdServeError: NIXL could not register the memory.
        """
        if self._server is not None or not regions:
            raise ValueError("register() is called once, with at least one region")
        unique = f"{self._name}/{uuid.uuid4().hex[:12]}"
        try:
            self._server = NixlAgent(f"{unique}/serve", regions, progress_thread=True)
            self._reader = NixlReader(unique, regions, self._on_failure)
        except NixlFailure as failure:
            self.close()
            raise PdServeError(str(failure)) from failure
        self._regions = tuple(regions)
        self._endpoint = msgspec.msgpack.encode(_NixlEndpoint(self._server.metadata(), list(regions)))

    @property
    def heads(self) -> KvHeads | None:
        """See `RankTransport`."""
        return common_heads(self._regions)

    def endpoint(self) -> bytes:
        """What a peer has to know to read from here: about 1 kB and 120 bytes a region.

        Raises:
            ValueError: Nothing is registered.
        """
        if not self._endpoint:
            raise ValueError("register() comes first")
        return self._endpoint

    async def read(
        self,
        peer: str,
        endpoint: bytes,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        heads: KvHeads | None = None,
    ) -> int:
        """Copies the peer's `remote_blocks[i]` over the local `local_blocks[i]`, in every region.

        As `RankTransport.read`. Blocks are copied in no particular order; runs of neighbours on both sides
        move as one if they are whole.

        Raises:
            PeerLostError: As there; also when this transport is closed.
            ValueError: The endpoint is not one, its regions do not match the local ones, or a block does
                not exist. Nothing was copied.
        """
        reader = self._reader
        if reader is None:
            raise PeerLostError(f"the transport {self._name} is closed or not registered")
        source = self._source(peer, endpoint, heads)
        pairs = np.array([remote_blocks, local_blocks], dtype=np.int32)
        if pairs.size == 0:
            return 0
        if pairs.min() < 0 or (pairs.max(axis=1) >= source.limits).any():
            theirs, ours = source.limits
            raise ValueError(f"block out of range: the peer has {theirs}, this instance {ours}")
        pairs = pairs[:, np.argsort(pairs[0], kind="stable")]
        loop = asyncio.get_running_loop()
        job = ReadJob(
            peer=peer,
            path=source.path,
            block_bytes=source.block_bytes,
            remote_blocks=pairs[0],
            local_blocks=pairs[1],
            deadline=time.monotonic() + self._timeout_s,
            loop=loop,
            done=loop.create_future(),
            quiet=loop.create_future(),
        )
        reader.submit(job)
        await self._caller.wait_for(job.done, job.quiet, job.local_blocks.tolist(), job.cancelled.set)
        return len(local_blocks) * source.block_bytes

    def forget(self, peer: str) -> None:
        """Drops the connection to a peer that is gone; its reads end with PeerLostError."""
        self._sources.pop(peer, None)
        if self._reader is not None:
            self._reader.forget(peer)

    def close(self) -> None:
        """Ends all reads with PeerLostError and frees everything. Idempotent. Blocks for at most 2 s."""
        reader, self._reader = self._reader, None
        server, self._server = self._server, None
        self._sources.clear()
        if reader is not None:
            reader.close()
        if server is not None:
            server.close()

    def _source(self, peer: str, endpoint: bytes, heads: KvHeads | None) -> _Source:
        """What to read from a peer. Raises: ValueError."""
        known = self._sources.get(peer)
        if known is None or (known.endpoint, known.heads) != (endpoint, heads):
            known = self._sources[peer] = self._checked(endpoint, heads)
        return known

    def _checked(self, endpoint: bytes, heads: KvHeads | None) -> _Source:
        try:
            remote = msgspec.msgpack.decode(endpoint, type=_NixlEndpoint)
        except msgspec.DecodeError as error:
            raise ValueError(f"not a NIXL transport's endpoint: {error}") from error
        ours, theirs = paired_rows(self._regions, remote.regions, heads)
        if [memory_kind(rows) for rows in ours] != [memory_kind(rows) for rows in theirs]:
            raise ValueError("the peer's KV regions are in another kind of memory than the local ones")
        if any(sum(rows.number for rows in side) > MAX_ROWS for side in (theirs, ours)):
            raise ValueError("more blocks than NIXL's indices can tell apart")
        return _Source(
            endpoint,
            heads,
            ReadPath(remote.metadata, tuple(theirs), None if heads is None else tuple(ours)),
            sum(rows.size for rows in ours),
            [min(region.num_blocks for region in regions) for regions in (remote.regions, self._regions)],
        )
