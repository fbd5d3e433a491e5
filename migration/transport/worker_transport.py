"""`WorkerTransport`: the KV memory of one worker's process, as seen from its instance."""

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from migration.errors import PeerLostError
from migration.tasks import settle
from migration.transport.kv_transport import KvHeads
from migration.transport.read_caller import ReadCaller
from migration.transport.worker_messages import (
    BlocksQuiet,
    CancelRead,
    ForgetPeer,
    FromWorker,
    ReadBlocks,
    ReadEnded,
    ToWorker,
    framed,
    received,
)


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The KV memory of a worker's process, with a transport that runs there.

    Attributes:
        endpoint: The transport's.
        connection: To the `WorkerServer` there. The worker's process has ended when this has.
        heads: See `RankTransport`.
    """

    rank: int
    endpoint: bytes
    connection: socket.socket
    heads: KvHeads | None = None


@dataclass(eq=False, slots=True)
class _Call:
    done: "asyncio.Future[None]"
    quiet: "asyncio.Future[None]"
    copied: int = 0


class WorkerTransport:
    """A `RankTransport` whose reads a worker's process carries out. Belongs to one event loop.

    Args:
        name: The instance's id.
        timeout_s: The bound of one `read` there.
        on_failure: Called when the worker does not answer, or has ended. It has to end the process.

    Attributes:
        quarantine: See `KvTransport`.
    """

    def __init__(
        self,
        name: str,
        worker: WorkerMemory,
        *,
        timeout_s: float = 30.0,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._what = f"worker {worker.rank} of {name}"
        self._worker = worker
        self._on_failure = on_failure
        self._caller = ReadCaller(self._what, timeout_s, on_failure)
        self.quarantine = self._caller.quarantine
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begins to use the connection. Comes before `read`."""
        reader, self._writer = await asyncio.open_connection(sock=self._worker.connection)
        self._receiving = asyncio.create_task(self._receive(reader))

    @property
    def heads(self) -> KvHeads | None:
        """Those of the worker."""
        return self._worker.heads

    def endpoint(self) -> bytes:
        """That of the worker's transport."""
        return self._worker.endpoint

    async def read(
        self,
        peer: str,
        endpoint: bytes,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        heads: KvHeads | None = None,
    ) -> int:
        """As `RankTransport.read`.

        Raises:
            PeerLostError: As there; also when this transport is closed, or the worker has ended.
            ValueError: The arguments do not fit the memory.
        """
        loop, number = asyncio.get_running_loop(), next(self._numbers)
        local = list(local_blocks)
        message = ReadBlocks(number, peer, endpoint, list(remote_blocks), local, heads)
        if self._writer is None:
            raise PeerLostError(f"the transport of {self._what} is closed")
        call = self._calls[number] = _Call(loop.create_future(), loop.create_future())
        self._send(message)
        await self._caller.wait_for(call.done, call.quiet, local, lambda: self._send(CancelRead(number)))
        return call.copied

    def forget(self, peer: str) -> None:
        """As `KvTransport.forget`."""
        self._send(ForgetPeer(peer))

    def close(self) -> None:
        """Closes the connection, upon which the worker frees its transport. Idempotent."""
        if self._receiving is not None:
            self._receiving.cancel()
        self._end(PeerLostError(f"the transport of {self._what} is closed"))

    def _send(self, message: ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(framed(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        error: Exception = PeerLostError(f"{self._what} has ended")
        try:
            await self._take_all(reader)
        except Exception as unforeseen:
            error = unforeseen
        self._end(PeerLostError(str(error)))
        self._on_failure(error)

    async def _take_all(self, reader: asyncio.StreamReader) -> None:
        async for message in received(reader, msgspec.msgpack.Decoder(FromWorker)):
            match message:
                case ReadEnded(call=number):
                    call = self._calls[number]
                    call.copied = message.copied
                    if message.is_quiet:
                        self._is_quiet(number)
                    settle(call.done, _error(message))
                case BlocksQuiet(call=number):
                    self._is_quiet(number)

    def _is_quiet(self, number: int) -> None:
        settle(self._calls.pop(number).quiet, None)

    def _end(self, error: PeerLostError) -> None:
        """Ends all reads. What they may still write to stays in quarantine: nothing more is heard of it."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for call in self._calls.values():
            settle(call.done, error)


def _error(ended: ReadEnded) -> Exception | None:
    if ended.error is None:
        return None
    return PeerLostError(ended.error) if ended.is_lost else ValueError(ended.error)
