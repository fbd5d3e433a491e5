"""The transport in a worker's process, which owns the memory, on behalf of the worker's instance."""

import asyncio
import logging
import socket
import threading
from functools import partial

import msgspec

from migration.errors import PeerLostError
from migration.tasks import BackgroundTasks
from migration.transport.kv_transport import RankTransport
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

logger = logging.getLogger(__name__)


class WorkerServer:
    """Serves a worker's transport to the worker's instance, in a thread: reads do not wait for steps.

    Ends with the connection, and the connection with it.

    Args:
        transport: With its memory; belongs to the server from now on.
        connection: To the instance.
    """

    def __init__(self, transport: RankTransport, connection: socket.socket) -> None:
        self._transport = transport
        self._connection = connection
        self._reads: dict[int, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name="kv-transport", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException:
            logger.exception("the transport of a worker has failed")
            raise
        finally:
            self._connection.close()

    async def _serve(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._connection)
        decoder, tasks = msgspec.msgpack.Decoder(ToWorker), BackgroundTasks()
        try:
            async for message in received(reader, decoder):
                match message:
                    case ReadBlocks(call=call):
                        self._reads[call] = tasks.start(self._read(message, writer))
                        self._reads[call].add_done_callback(partial(self._forget, call))
                    case CancelRead(call=call):
                        if (read := self._reads.get(call)) is not None:
                            read.cancel()
                    case ForgetPeer(peer=peer):
                        self._transport.forget(peer)
        finally:
            self._transport.close()
            await tasks.cancel()
            writer.close()

    def _forget(self, call: int, read: "asyncio.Task[None]") -> None:
        del self._reads[call]

    async def _read(self, read: ReadBlocks, writer: asyncio.StreamWriter) -> None:
        def send(message: FromWorker) -> None:
            writer.write(framed(message))

        try:
            copied = await self._transport.read(
                read.peer, read.endpoint, read.remote_blocks, read.local_blocks, read.heads
            )
        except asyncio.CancelledError:
            error, is_lost = f"KV read from {read.peer}: was cancelled", True
        except PeerLostError as lost:
            error, is_lost = lost.refusal.text, True
        except Exception as unforeseen:
            error, is_lost = f"{type(unforeseen).__name__}: {unforeseen}", False
        else:
            send(ReadEnded(read.call, copied))
            return
        quarantine = self._transport.quarantine
        is_quiet = not quarantine.holds(read.local_blocks)
        send(ReadEnded(read.call, error=error, is_lost=is_lost, is_quiet=is_quiet))
        if not is_quiet:
            await quarantine.wait_for(read.local_blocks)
            send(BlocksQuiet(read.call))
