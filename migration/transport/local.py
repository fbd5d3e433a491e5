"""`LocalTransport`: KV blocks between instances of one process, with failures and delays on demand.

For tests, simulation and several instances in one process. It keeps the whole contract of `KvTransport`,
bounds and lost peers included. Its only clock is the event loop's, so it runs in virtual time too.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
from collections.abc import Sequence
from enum import Enum

import msgspec

from migration.errors import PeerLostError
from migration.tasks import settle
from migration.transport.head_slices import KvRows, common_heads, paired_rows, rows_of
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.quarantine import Quarantine

# What is copied between two visits to the event loop.
CHUNK_BYTES = 4 << 20


class _Health(Enum):
    STALLED = "stalled"
    FAILED = "failed"


class _LocalEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to read from an instance: its name, and which of its incarnations."""

    name: str
    incarnation: int


class LocalFabric:
    """What connects local transports: members, speed and failures.

    Latency and speed may be changed at any time and count for each read on its own: reads do not share
    the speed, unless a subclass changes that in `copy_s`. Belongs to one event loop.

    Args:
        latency_s: Time before a read's first byte.
        bytes_per_s: Speed of a read; None for as fast as memory.
        timeout_s: Bound of one read.

    Attributes:
        quarantine_s: How long the blocks of a read that has failed stay in quarantine.
    """

    def __init__(
        self, *, latency_s: float = 0.0, bytes_per_s: float | None = None, timeout_s: float = 30.0
    ) -> None:
        self.quarantine_s = 0.0
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.timeout_s = timeout_s
        self._incarnations = itertools.count()
        self._members: dict[str, LocalTransport] = {}
        self._health: dict[str, _Health] = {}
        self._changed = asyncio.Event()

    def transport(self, name: str) -> LocalTransport:
        """Makes the transport of an instance. One of the same name made before counts as dead from now on."""
        member = LocalTransport(self, _LocalEndpoint(name, next(self._incarnations)))
        self._members[name] = member
        self.announce()
        return member

    def fail(self, name: str) -> None:
        """Breaks an instance off: reads of it and by it, those under way too, raise PeerLostError at once."""
        self._health[name] = _Health.FAILED
        self.announce()

    def stall(self, name: str) -> None:
        """Silences an instance: reads of it stand still until `restore`, or until their bound."""
        self._health[name] = _Health.STALLED
        self.announce()

    def restore(self, name: str) -> None:
        """Ends `fail` or `stall`. Reads that stood still go on."""
        self._health.pop(name, None)
        self.announce()

    # ---- What transports use ----

    def begin_read(self, source: str, destination: str) -> None:
        """A read of `source` by `destination` begins."""

    def end_read(self, source: str, destination: str) -> None:
        """The read has ended, or failed."""

    def copy_s(self, source: str, destination: str, num_bytes: int) -> float:
        """Duration of a copy of `num_bytes`, with the reads that are in progress."""
        return num_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    def member(self, address: _LocalEndpoint) -> LocalTransport | None:
        """The instance behind an endpoint; None if it is closed, was started anew, or has failed."""
        member = self._members.get(address.name)
        alive = member is not None and member.address == address
        return member if alive and self._health.get(address.name) is not _Health.FAILED else None

    def is_stalled(self, address: _LocalEndpoint) -> bool:
        return self._health.get(address.name) is _Health.STALLED

    def leave(self, member: LocalTransport) -> None:
        """Takes a closed transport out, unless it has been replaced. Idempotent."""
        if self._members.get(member.address.name) is member:
            del self._members[member.address.name]
        self.announce()

    def announce(self) -> None:
        """Wakes all waiters in `change`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self) -> None:
        """Waits for the next change of anything: a member, its health, a connection."""
        await self._changed.wait()


class LocalTransport:
    """A `KvTransport` within one process; made by `LocalFabric.transport`.

    A region at address 0 stands for memory that is not there (a simulated engine's): reading it takes its
    time and copies nothing.

    Attributes:
        address: This incarnation of the instance.
        regions: What is registered.
        quarantine: Filled on demand (`LocalFabric.quarantine_s`): here a read that has failed writes no more.
    """

    def __init__(self, fabric: LocalFabric, address: _LocalEndpoint) -> None:
        self.address = address
        self.regions: tuple[KvRegion, ...] = ()
        self.quarantine = Quarantine()
        self._fabric = fabric
        self._connections: dict[str, object] = {}

    def register(self, regions: Sequence[KvRegion]) -> None:
        """Makes the regions readable by peers and writable by `read`. The caller keeps the memory alive.

        Raises:
            ValueError: There are no regions, some are registered already, or one is not in host memory.
        """
        if self.regions or not regions:
            raise ValueError("register() is called once, with at least one region")
        if any(region.device_id >= 0 for region in regions):
            raise ValueError("the local transport copies host memory only")
        self.regions = tuple(regions)

    @property
    def heads(self) -> KvHeads | None:
        """See `RankTransport`."""
        return common_heads(self.regions)

    def endpoint(self) -> bytes:
        """What a peer has to know to read from here."""
        return msgspec.msgpack.encode(self.address)

    async def read(
        self,
        peer: str,
        endpoint: bytes,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        heads: KvHeads | None = None,
    ) -> int:
        """Copies the peer's `remote_blocks[i]` over the local `local_blocks[i]`, in every region.

        As `RankTransport.read`. The bytes of a chunk arrive at its end; a cancelled read copies no further
        one.

        Raises:
            PeerLostError: As there; also when this transport is closed.
            ValueError: The endpoint is not one, the regions of the two do not match, or a block does not
                exist. Nothing was copied.
        """
        try:
            source = msgspec.msgpack.decode(endpoint, type=_LocalEndpoint)
        except msgspec.DecodeError as error:
            raise ValueError(f"not a local transport's endpoint: {error}") from error
        pairs = list(zip(remote_blocks, local_blocks, strict=True))
        connection = self._connections.setdefault(peer, object())
        self._check(self._source(peer, source, connection).regions, heads, pairs)
        block_bytes = sum(rows.size for rows in rows_of(self.regions, heads))
        chunk = max(1, CHUNK_BYTES // max(1, block_bytes))
        self._fabric.begin_read(source.name, self.address.name)
        try:
            async with asyncio.timeout(self._fabric.timeout_s):
                await self._elapse(peer, source, connection, self._fabric.latency_s)
                for start in range(0, len(pairs), chunk):
                    part = pairs[start : start + chunk]
                    duration_s = self._fabric.copy_s(source.name, self.address.name, len(part) * block_bytes)
                    remote = await self._elapse(peer, source, connection, duration_s)
                    for ours, theirs in zip(*paired_rows(self.regions, remote.regions, heads), strict=True):
                        _copy(theirs, ours, part)
        except BaseException as error:
            if quarantine_s := self._fabric.quarantine_s:
                self._keep(local_blocks, quarantine_s)
            if isinstance(error, TimeoutError):
                raise PeerLostError(f"KV read from {peer}: took too long to answer") from error
            raise
        finally:
            self._fabric.end_read(source.name, self.address.name)
        return len(pairs) * block_bytes

    def forget(self, peer: str) -> None:
        """Drops the connection to a peer that is gone; its reads end with PeerLostError."""
        self._connections.pop(peer, None)
        self._fabric.announce()

    def close(self) -> None:
        """Ends all reads, of this instance and by it, with PeerLostError. Idempotent."""
        self._connections.clear()
        self._fabric.leave(self)

    def _keep(self, blocks: Sequence[int], quarantine_s: float) -> None:
        loop = asyncio.get_running_loop()
        quiet: asyncio.Future[None] = loop.create_future()
        self.quarantine.add(blocks, quiet)
        loop.call_later(quarantine_s, settle, quiet, None)

    def _source(self, peer: str, source: _LocalEndpoint, connection: object) -> LocalTransport:
        """The live transport to read from.

        Raises:
            PeerLostError: There is none, or this side has dropped the connection.
        """
        remote = self._fabric.member(source)
        if remote is None:
            raise PeerLostError(f"KV read from {peer}: it is gone")
        if self._connections.get(peer) is not connection or self._fabric.member(self.address) is not self:
            raise PeerLostError(f"KV read from {peer}: the connection was closed on this side")
        return remote

    async def _elapse(
        self, peer: str, source: _LocalEndpoint, connection: object, duration_s: float
    ) -> LocalTransport:
        """Lets the time pass, not counting a stall of the peer. Visits the event loop at least once.

        Raises:
            PeerLostError: The peer is lost before that.
        """
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while True:
            remote = self._source(peer, source, connection)
            if self._fabric.is_stalled(source):
                await self._fabric.change()
            elif duration_s <= 0:
                return remote
            else:
                began = loop.time()
                try:
                    async with asyncio.timeout(duration_s):
                        await self._fabric.change()
                    duration_s -= loop.time() - began
                except TimeoutError:
                    duration_s = 0.0

    def _check(
        self, remote: Sequence[KvRegion], heads: KvHeads | None, pairs: Sequence[tuple[int, int]]
    ) -> None:
        paired_rows(self.regions, remote, heads)
        theirs = min((region.num_blocks for region in remote), default=0)
        ours = min((region.num_blocks for region in self.regions), default=0)
        if not all(0 <= remote < theirs and 0 <= local < ours for remote, local in pairs):
            raise ValueError(f"block out of range: the peer has {theirs}, this instance {ours}")


def _copy(theirs: KvRows, ours: KvRows, pairs: Sequence[tuple[int, int]]) -> None:
    if not theirs.address or not ours.address:
        return
    for remote, local in pairs:
        ctypes.memmove(ours.address + local * ours.stride, theirs.address + remote * theirs.stride, ours.size)
