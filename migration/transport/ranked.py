"""`RankedTransport`: the KV memory of an engine whose workers hold a part of every block each.

A block id is one row through the memory of all ranks, so a read copies the same rows on each of them.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

import msgspec

from migration.transport.kv_transport import KvTransport
from migration.transport.quarantine import Quarantine
from migration.transport.worker_transport import WorkerMemory, WorkerTransport


class RankedTransport:
    """A `KvTransport` over those of the ranks, each of which reads from the peer's same rank.

    Args:
        ranks: In the order that all instances share.

    Attributes:
        quarantine: All that is in quarantine on a rank.
    """

    def __init__(self, ranks: Sequence[KvTransport]) -> None:
        self.quarantine = Quarantine(*(rank.quarantine for rank in ranks))
        self._ranks = tuple(ranks)

    def endpoint(self) -> bytes:
        """Those of all ranks."""
        return msgspec.msgpack.encode([rank.endpoint() for rank in self._ranks])

    async def read(
        self, peer: str, endpoint: bytes, remote_blocks: Sequence[int], local_blocks: Sequence[int]
    ) -> int:
        """As `KvTransport.read`. Ends when those of all ranks have ended; an error of one cancels the others.

        Returns:
            Bytes copied, of all ranks together.

        Raises:
            PeerLostError: As there, of any rank.
            ValueError: The peer has another number of ranks; or as there.
        """
        try:
            endpoints = msgspec.msgpack.decode(endpoint, type=list[bytes])
        except msgspec.DecodeError as error:
            raise ValueError(f"not the endpoint of several ranks: {error}") from error
        if len(endpoints) != len(self._ranks):
            raise ValueError(f"the peer has {len(endpoints)} ranks instead of {len(self._ranks)}")
        reads = [
            asyncio.ensure_future(rank.read(peer, theirs, remote_blocks, local_blocks))
            for rank, theirs in zip(self._ranks, endpoints, strict=True)
        ]
        try:
            await asyncio.wait(reads, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await _end(reads)
        for read in reads:
            if not read.cancelled() and (failed := read.exception()) is not None:
                raise failed
        return sum(read.result() for read in reads)

    def forget(self, peer: str) -> None:
        """As `KvTransport.forget`, on all ranks."""
        for rank in self._ranks:
            rank.forget(peer)

    def close(self) -> None:
        """As `KvTransport.close`, on all ranks."""
        for rank in self._ranks:
            rank.close()


async def open_workers(
    name: str, workers: Sequence[WorkerMemory], on_failure: Callable[[BaseException], None]
) -> KvTransport:
    """The transport of an instance whose workers hold its KV memory.

    Args:
        name: The instance's id.
        workers: By rank; at least one.
        on_failure: See `WorkerTransport`.
    """
    ranks = [WorkerTransport(name, worker, on_failure=on_failure) for worker in workers]
    for rank in ranks:
        await rank.open()
    return ranks[0] if len(ranks) == 1 else RankedTransport(ranks)


async def _end(reads: Iterable["asyncio.Future[int]"]) -> None:
    """Cancels the reads that go on and waits for their ends, also if it is cancelled meanwhile.

    Raises:
        asyncio.CancelledError: It was.
    """
    going_on = {read for read in reads if not read.done()}
    for read in going_on:
        read.cancel()
    cancelled: asyncio.CancelledError | None = None
    while going_on:
        try:
            _, going_on = await asyncio.wait(going_on)
        except asyncio.CancelledError as error:
            cancelled = error
            going_on = {read for read in going_on if not read.done()}
    for read in reads:
        with contextlib.suppress(asyncio.CancelledError):
            read.exception()  # so that asyncio does not report it
    if cancelled is not None:
        raise cancelled
