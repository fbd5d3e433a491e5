"""A process that sends the load reports of many instances, each over a connection of its own."""

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import msgspec

from pd_serve.comm.messages import LoadReport
from pd_serve.comm.wire import CurveKeys, Wire
from router.load import InstanceLoad

HOST = "127.0.0.1"

#: Reports are sent in groups of this interval, in seconds.
GROUP_S = 0.001

#: Time for each connection to open, in seconds.
CONNECT_S = 0.008


class ReportSenders:
    """The instances of these loads. Use as a context.

    Args:
        interval_s: Time between two reports of an instance.

    Attributes:
        address: All of them receive messages there, which have no effect.
    """

    def __init__(self, keys: CurveKeys, loads: Sequence[InstanceLoad], interval_s: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        frames = [[load.instance_id.encode(), msgspec.msgpack.encode(LoadReport(load, []))] for load in loads]
        arguments = (theirs, (keys.public, keys.secret), frames, interval_s)
        self._process = spawn.Process(target=_send, args=arguments, daemon=True)
        self.address = ""

    async def __aenter__(self) -> "ReportSenders":
        await asyncio.to_thread(self._process.start)
        self.address = await self._answer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        await asyncio.to_thread(self._process.join)

    async def begin(self, address: str) -> None:
        """Connects all instances to this address, and begins to send. Returns when all have sent once."""
        self._connection.send(address)
        await self._answer()

    async def end(self) -> int:
        """Ends sending. Returns the number of reports sent since `begin`."""
        self._connection.send("")
        return int(await self._answer())

    async def _answer(self) -> Any:
        return await asyncio.to_thread(self._connection.recv)


def _send(
    connection: Connection, keys: tuple[bytes, bytes], frames: list[list[bytes]], interval_s: float
) -> None:
    asyncio.run(_serve(connection, CurveKeys(*keys), frames, interval_s))


async def _serve(
    connection: Connection, keys: CurveKeys, frames: list[list[bytes]], interval_s: float
) -> None:
    wire = Wire("senders", HOST, keys)
    connection.send(wire.listen_for_frames(lambda received: None))
    address = await asyncio.to_thread(connection.recv)
    sockets = [wire.publisher(address) for _ in frames]
    for socket, report in zip(sockets, frames, strict=True):
        socket.send_multipart(report)
    await asyncio.sleep(2.0 + len(sockets) * CONNECT_S)  # all connections are open then
    connection.send("began")
    number, began = 0, time.monotonic()
    turns = itertools.cycle(zip(sockets, frames, strict=True))
    while not connection.poll():
        due = int((time.monotonic() - began) / interval_s * len(frames))
        for socket, report in itertools.islice(turns, due - number):
            socket.send_multipart(report)
        number = due
        await asyncio.sleep(GROUP_S)
    connection.recv()
    connection.send(number)
