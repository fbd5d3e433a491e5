"""Messages between an instance and the transports in its workers' processes, over a Unix socket each."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import msgspec

from migration.transport.kv_transport import KvHeads

T = TypeVar("T")

_LENGTH_BYTES = 4


class ReadBlocks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To a worker: `RankTransport.read`, under a number of its own."""

    call: int
    peer: str
    endpoint: bytes
    remote_blocks: list[int]
    local_blocks: list[int]
    heads: KvHeads | None = None


class CancelRead(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To a worker: the read's caller was cancelled."""

    call: int


class ForgetPeer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To a worker: `KvTransport.forget`."""

    peer: str


class ReadEnded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From a worker: what a read has returned or raised.

    Attributes:
        copied: Bytes.
        error: None if it has returned.
        is_lost: The error is a `PeerLostError`, and not one of the arguments.
        is_quiet: Nothing writes to the local blocks any more.
    """

    call: int
    copied: int = 0
    error: str | None = None
    is_lost: bool = False
    is_quiet: bool = True


class BlocksQuiet(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From a worker: nothing writes any more to the local blocks of a read that has failed."""

    call: int


ToWorker = ReadBlocks | CancelRead | ForgetPeer
FromWorker = ReadEnded | BlocksQuiet


def framed(message: ToWorker | FromWorker) -> bytes:
    """A message as it is sent."""
    encoded = msgspec.msgpack.encode(message)
    return len(encoded).to_bytes(_LENGTH_BYTES) + encoded


async def received(reader: asyncio.StreamReader, decoder: "msgspec.msgpack.Decoder[T]") -> AsyncIterator[T]:
    """The messages of a connection until that ends."""
    try:
        while True:
            length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
            yield decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return
