"""Objects between a service and its child process."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from pd_serve.launch.child_channel import ChildChannel


@pytest.fixture
async def ends() -> AsyncIterator[tuple[ChildChannel, ChildChannel]]:
    ours, theirs = socket.socketpair()
    a, b = await ChildChannel.open(ours), await ChildChannel.open(theirs)
    yield a, b
    await a.close()
    await b.close()


async def test_objects_arrive_whole_and_in_order_in_both_directions(
    ends: tuple[ChildChannel, ChildChannel],
) -> None:
    a, b = ends
    long = b"x" * 3_000_000  # more than a socket holds
    a.send(long)
    a.send(("after", {"it": 1}))
    b.send("back")

    assert await b.receive() == long
    assert await b.receive() == ("after", {"it": 1})
    assert await a.receive() == "back"


async def test_the_end_of_the_other_process_is_the_end_of_the_channel(
    ends: tuple[ChildChannel, ChildChannel],
) -> None:
    a, b = ends
    b.send("last")
    await b.close()

    assert await a.receive() == "last"
    with pytest.raises(EOFError):
        await a.receive()
    a.send("into the void")  # is dropped


async def test_an_object_that_breaks_off_is_the_end_of_the_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = await ChildChannel.open(ours)
    theirs.sendall((100).to_bytes(8, "big") + b"half of it")
    theirs.close()

    async with asyncio.timeout(10):
        with pytest.raises(EOFError):
            await channel.receive()
    await channel.close()
