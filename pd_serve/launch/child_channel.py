"""A channel between `pd-serve serve` and one of its child processes: objects, pickled, over a socket pair.

Both ends are processes of one service and trust each other. Secrets go this way, and not by the command line
or the environment, where others can see them.
"""

import asyncio
import pickle
import socket
from typing import Any, Self

#: Bytes of the length before each object.
LENGTH_BYTES = 8


class ChildChannel:
    """One end. Closed when the other end is closed, or its process has ended."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Self:
        """Takes over one socket of a pair."""
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: object) -> None:
        """Sends an object. One that the other end does not receive any more is dropped."""
        data = pickle.dumps(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def receive(self) -> Any:
        """The next object, of whatever type. Raises: EOFError: the channel is closed."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            data = await self._reader.readexactly(length)
        except OSError as error:  # the end itself is an EOFError of asyncio's
            raise EOFError from error
        # In a thread: an object of vLLM's, such as a compilation configuration, imports it.
        return await asyncio.to_thread(pickle.loads, data)

    async def close(self) -> None:
        """Sends what is left, and closes."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # the other end was faster
