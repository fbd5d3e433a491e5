"""The listening ports of a running service, and what each says to somebody who has no key."""

import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import psutil
import zmq
from zmq.utils.monitor import parse_monitor_message

from pd_serve.comm.membership import Membership
from tests.e2e.server_process import ServerProcess

#: One method of each kind of gRPC server of Ray's.
RAY_METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ObjectManagerService/FreeObjects",
)

#: Who has said nothing for so long says nothing. All ports are asked at once.
SILENCE_S = 2.0

GARBAGE = (b"", b"\x00" * 200, b"\xff" * 200, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200)


@dataclass(frozen=True)
class Port:
    """A listening TCP socket and the process that it belongs to."""

    process: str
    host: str
    number: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.host)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return address.is_loopback

    def talk(self, said: bytes) -> bytes:
        """What comes back within `SILENCE_S`, or until the other end closes."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.number), 10) as connection:
            connection.settimeout(SILENCE_S)
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(said)
                while part := connection.recv(65536):
                    answer += part
        return answer

    @property
    def speaks(self) -> str:
        """By how it begins: "zeromq", "grpc", "http" (when it is asked), or "nothing"."""
        answer = self.talk(b"") or self.talk(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        if answer.startswith(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f"):
            return "zeromq"
        if answer[3:5] == b"\x04\x00":  # the settings that an HTTP/2 server begins with
            return "grpc"
        if answer.startswith(b"HTTP/1."):
            return "http"
        return "nothing" if not answer else f"something else: {answer!r}"

    def ask_ray(self) -> set[str]:
        """Status codes of Ray's methods, without a token."""
        codes = set()
        with grpc.insecure_channel(f"127.0.0.1:{self.number}") as channel:
            for method in RAY_METHODS:
                try:
                    channel.unary_unary(method)(b"", timeout=20)
                    codes.add("OK")
                except grpc.RpcError as error:
                    codes.add(error.code().name)
        return codes

    def says_nothing(self) -> bool:
        return not any(map(self.talk, GARBAGE))

    def get(self, path: str) -> int:
        return httpx.get(f"http://127.0.0.1:{self.number}{path}", timeout=20).status_code

    def lets_in(self, keys: str) -> bool:
        """Whether a ZeroMQ peer without keys, or with others, may talk: it would say decode-0 is lost."""
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.linger = 0
            if keys == "others":
                stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
                stranger.curve_serverkey = zmq.curve_keypair()[0]
            decided = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
            with stranger.get_monitor_socket(decided) as monitor:
                stranger.connect(f"tcp://127.0.0.1:{self.number}")
                without_instances = msgspec.msgpack.encode(Membership(2**40, "tcp://127.0.0.1:1"))
                stranger.send_multipart([b"manager", without_instances], zmq.NOBLOCK)
                assert monitor.poll(30_000), "it is neither taken nor refused"
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                stranger.disable_monitor()
        return bool(event == zmq.Event.HANDSHAKE_SUCCEEDED)


#: Ends of the words that say what a Python process runs.
SCRIPTS = (".py", "pd-serve", "api_server_process")


def ask_all(ports: Sequence[Port], question: Callable[[Port], Any]) -> list[tuple[Port, Any]]:
    """Each port and its answer."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        return list(zip(ports, pool.map(question, ports), strict=True))


def processes(server: ServerProcess) -> list[psutil.Process]:
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def listening(server: ServerProcess) -> Iterator[Port]:
    """All TCP ports of the service and of everything that it has started."""
    for process in processes(server):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                yield Port(_name(process), connection.laddr.ip, connection.laddr.port)


def _name(process: psutil.Process) -> str:
    """As it is called by people: "ray::InstanceActor", "raylet", "monitor.py"."""
    name = process.name()
    if name.startswith("python"):
        scripts = [Path(part).name for part in process.cmdline()[1:] if part.endswith(SCRIPTS)]
        name = scripts[0] if scripts else name
    return name.split(".wait")[0]
