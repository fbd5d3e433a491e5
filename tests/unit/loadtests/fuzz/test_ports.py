"""Listening ports and their protocols."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from loadtests.fuzz import ports
from loadtests.fuzz.ports import Protocol, listening_ports, protocol_of
from loadtests.processes import ServiceProcesses


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "SILENCE_S", 0.3)


async def detected(begins_with: bytes, answers: bytes) -> Protocol:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begins_with)
        if not begins_with and await reader.read(100):
            writer.write(answers)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        return await asyncio.to_thread(protocol_of, listener.sockets[0].getsockname()[1])


@pytest.mark.parametrize(
    ("begins_with", "answers", "protocol"),
    [
        (b"\xff\0\0\0\0\0\0\0\x01\x7f", b"", Protocol.ZMTP),
        (b"\0\0\x06\x04\0\0\0\0\0", b"", Protocol.GRPC),
        (b"", b"HTTP/1.1 404 Not Found\r\n", Protocol.HTTP),
        (b"", b"", Protocol.SILENT),
    ],
)
async def test_the_protocol_of_a_port(begins_with: bytes, answers: bytes, protocol: Protocol) -> None:
    assert await detected(begins_with, answers) is protocol


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_listening_ports_of_a_process_are_found(listener: socket.socket) -> None:
    number = listener.getsockname()[1]

    (found,) = [port for port in listening_ports(ServiceProcesses(os.getpid())) if port.number == number]

    assert found.pid == os.getpid()
    assert found.protocol is Protocol.SILENT
