"""`RankedTransport`: the KV memory of an engine whose workers hold a part of every block each.

A block id is one row through the memory of all ranks, so a read copies the same rows on each of them: whole
rows from the peer's same rank, or slices of rows if the peer has another number of ranks.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence

import msgspec

from migration.transport.head_slices import plan
from migration.transport.kv_transport import KvHeads, KvTransport, RankTransport
from migration.transport.quarantine import Quarantine
from migration.transport.worker_transport import WorkerMemory, WorkerTransport


class _RankEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to read from a rank."""

    heads: KvHeads | None
    endpoint: bytes


class RankedTransport:
    """A `KvTransport` over those of the ranks.

    Args:
        ranks: In the order that all instances share.

    Attributes:
        quarantine: All that is in quarantine on a rank.
    """

    def __init__(self, ranks: Sequence[RankTransport]) -> None:
        self.quarantine = Quarantine(*(rank.quarantine for rank in ranks))
        self._ranks = tuple(ranks)
        self._read_from: dict[str, set[int]] = {}  # ranks of each peer

    def endpoint(self) -> bytes:
        """Those of all ranks."""
        return msgspec.msgpack.encode([_RankEndpoint(rank.heads, rank.endpoint()) for rank in self._ranks])

    async def read(
        self, peer: str, endpoint: bytes, remote_blocks: Sequence[int], local_blocks: Sequence[int]
    ) -> int:
        """As `KvTransport.read`. Ends when those of all ranks have ended; an error of one cancels the others.

        Returns:
            Bytes copied, of all ranks together.

        Raises:
            PeerLostError: As there, of any rank.
            ValueError: The peer's ranks do not hold what is needed here; or as there.
        """
        try:
            theirs = msgspec.msgpack.decode(endpoint, type=list[_RankEndpoint])
        except msgspec.DecodeError as error:
            raise ValueError(f"not the endpoint of ranks: {error}") from error
        planned = plan([rank.heads for rank in self._ranks], [rank.heads for rank in theirs])
        self._read_from.setdefault(peer, set()).update(read.peer_rank for read in planned)
        reads = [
            self._ranks[read.rank].read(
                _name(peer, read.peer_rank),
                theirs[read.peer_rank].endpoint,
                remote_blocks,
                local_blocks,
                read.heads,
            )
            for read in planned
        ]
        return await reads[0] if len(reads) == 1 else await _all(reads)

    def forget(self, peer: str) -> None:
        """As `KvTransport.forget`, on all ranks."""
        for peer_rank in sorted(self._read_from.pop(peer, {0})):
            for rank in self._ranks:
                rank.forget(_name(peer, peer_rank))

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
    return RankedTransport(ranks)


def _name(peer: str, rank: int) -> str:
    """A rank of a peer, to which there is a connection of its own."""
    return peer if rank == 0 else f"{peer}, rank {rank}"


async def _all(reads: Iterable[Coroutine[None, None, int]]) -> int:
    """The sum of their results, when all have ended."""
    tasks = [asyncio.ensure_future(read) for read in reads]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _end(tasks)
    for task in tasks:
        if not task.cancelled() and (failed := task.exception()) is not None:
            raise failed
    return sum(task.result() for task in tasks)


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
