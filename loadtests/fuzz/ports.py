"""The listening ports of a service, and the protocol of each."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import psutil

from loadtests.processes import ProcessKind, ServiceProcesses

#: A server that has said nothing for this long says nothing. All ports are asked at once.
SILENCE_S = 3.0

HOST = "127.0.0.1"


class Protocol(StrEnum):
    """What a port begins with, or answers to an HTTP request."""

    ZMTP = "zmtp"  # ZeroMQ, between the processes
    HTTP = "http"
    GRPC = "grpc"  # Ray's
    SILENT = "silent"  # NIXL (UCX) and gloo: not a byte


@dataclass(frozen=True, slots=True)
class ListeningPort:
    """A listening TCP socket.

    Attributes:
        kind: Of the process that it belongs to.
    """

    kind: ProcessKind
    pid: int
    number: int
    protocol: Protocol

    @property
    def is_of_the_service(self) -> bool:
        """Whether the server is pd-serve's, or HAProxy in front of it, and not one of Ray's own."""
        return self.kind not in (ProcessKind.OTHER, ProcessKind.RAYLET) and self.protocol is not Protocol.GRPC

    def __str__(self) -> str:
        return f"{self.protocol} of {self.kind} (pid {self.pid}, port {self.number})"


def listening_ports(processes: ServiceProcesses) -> list[ListeningPort]:
    """All listening TCP ports of a service, by number."""
    found: dict[int, tuple[ProcessKind, int]] = {}
    for process, kind in processes.kinds():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = (kind, process.pid)
    numbers: Sequence[int] = sorted(found)
    with ThreadPoolExecutor(max_workers=64) as pool:
        protocols = list(pool.map(protocol_of, numbers))
    return [
        ListeningPort(*found[number], number, protocol)
        for number, protocol in zip(numbers, protocols, strict=True)
    ]


def protocol_of(port: int) -> Protocol:
    """The protocol of a port, by what it says."""
    said = talk(port, b"") or talk(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    if said.startswith(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f"):
        return Protocol.ZMTP
    if said[3:5] == b"\x04\x00":  # the settings that an HTTP/2 server begins with
        return Protocol.GRPC
    return Protocol.HTTP if said.startswith(b"HTTP/1.") else Protocol.SILENT


def talk(port: int, said: bytes) -> bytes:
    """What comes back within a time, or until the other end closes."""
    answer = b""
    with socket.create_connection((HOST, port), 30) as connection:
        connection.settimeout(SILENCE_S)
        with suppress(TimeoutError, ConnectionError):
            connection.sendall(said)
            while part := connection.recv(65536):
                answer += part
    return answer
