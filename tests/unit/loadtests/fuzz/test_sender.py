"""What is sent, and what is a wrong answer."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtests.fuzz.frames import FrameMaker
from loadtests.fuzz.ports import ListeningPort, Protocol
from loadtests.fuzz.sender import ANSWER_S, FrameSender, judge
from loadtests.processes import ProcessKind
from loadtests.servers import free_port

KEY = "sk-key"
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE"


def port_of(protocol: Protocol, kind: ProcessKind = ProcessKind.API_SERVER) -> ListeningPort:
    return ListeningPort(kind, 1, 1, protocol)


@pytest.mark.parametrize(
    ("protocol", "said", "answer"),
    [
        (Protocol.SILENT, b"x", b""),
        (Protocol.ZMTP, b"x", GREETING),
        (Protocol.ZMTP, b"x", GREETING + b"\x04\xa8\x07WELCOME"),
        (Protocol.HTTP, b"x", b""),
        (Protocol.HTTP, b"x", b"HTTP/1.1 400 Bad Request\r\n"),
        (Protocol.HTTP, b"x", b"HTTP/1.1 503 Service Unavailable\r\n"),
        (Protocol.HTTP, b"Bearer sk-key", b'HTTP/1.1 200 OK\r\n{"choices": []}'),
        (Protocol.GRPC, b"x", b"\0\0\0\x04\0"),
    ],
)
def test_answers_that_a_server_may_give(protocol: Protocol, said: bytes, answer: bytes) -> None:
    assert judge(port_of(protocol), [said], answer, KEY) is None


@pytest.mark.parametrize(
    ("protocol", "said", "answer", "finding"),
    [
        (Protocol.SILENT, b"x", b"y", "answered b'y'"),
        (Protocol.ZMTP, b"x", GREETING + b"\x04\x06\x05READY", "admitted a peer without the cluster's key"),
        (Protocol.HTTP, b"x", b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 500 Internal", "answered 500"),
        (Protocol.HTTP, b"x", b'HTTP/1.1 200 OK\r\n{"choices": []}', "completed a prompt without a key"),
    ],
)
def test_answers_that_a_server_must_not_give(
    protocol: Protocol, said: bytes, answer: bytes, finding: str
) -> None:
    assert judge(port_of(protocol), [said], answer, KEY) == finding


def test_an_error_of_one_of_rays_own_servers_is_no_finding() -> None:
    """Its agents answer 500 to a header that is not ASCII."""
    port = port_of(Protocol.HTTP, ProcessKind.OTHER)

    assert judge(port, [b"x"], b"HTTP/1.1 500 Internal", KEY) is None


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[tuple[ListeningPort, list[bytes]]]:
    """A port that answers everything in the same way, and what it has received."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(1 << 20))
        writer.write(answer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        number = listener.sockets[0].getsockname()[1]
        yield ListeningPort(ProcessKind.INSTANCE, 1, number, Protocol.SILENT), received


def sender() -> FrameSender:
    return FrameSender(FrameMaker(1, KEY, "tiny"), KEY, random.Random(1))


async def test_a_port_that_breaks_its_silence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWER_S, Protocol.SILENT, 5.0)
    one = sender()
    async with server(b"hello") as (port, received):
        await one.converse(port)

    assert received
    assert one.frames[Protocol.SILENT] >= 1
    assert one.answered[Protocol.SILENT] == 1
    (finding,) = one.findings
    assert "silent of instance (pid 1" in finding
    assert "answered b'hello'" in finding


async def test_a_silent_port_is_no_finding() -> None:
    one = sender()
    async with server(b"") as (port, _):
        for _ in range(20):
            await one.converse(port)

    assert one.frames.total() >= 20
    assert one.findings == []
    assert not one.unreachable


async def test_a_port_that_is_gone_is_counted() -> None:
    one = sender()

    await one.converse(ListeningPort(ProcessKind.INSTANCE, 1, free_port(), Protocol.SILENT))

    assert one.unreachable.total() == 1
    assert one.frames.total() == 0
