"""ZeroMQ between the processes of a cluster: one inbound socket each, one outbound per peer.

All traffic is one-way messages, in order per sender. Every socket uses CURVE with the cluster's key pair,
on loopback too: a peer without it is not heard, and nobody reads along. Whoever has it is one of the cluster
and believed what it says, its name included.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from migration.tasks import BackgroundTasks
from pd_serve.comm.rejected_peers import RejectedPeerLog

logger = logging.getLogger(__name__)

#: Messages that may wait for a peer that does not read; more are dropped, as if the network had.
HIGH_WATER_MARK = 100_000


#: Longest frame that is taken, in bytes. It bounds what somebody can make a process hold before it is known
#: that he has no key; the longest that we send is a request, of at most `--max-body-bytes`.
MAX_FRAME_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The cluster's CURVE key pair (Z85). Whoever has it may talk; it travels through Ray only."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())

    @classmethod
    def of(cls, cluster_secret: bytes | None) -> "CurveKeys":
        """The pair of a given secret, or one made up."""
        return cls.generate() if cluster_secret is None else cls.derive(cluster_secret)

    @classmethod
    def derive(cls, cluster_secret: bytes) -> "CurveKeys":
        """The pair that belongs to a secret, which should be as hard to guess as a key of 32 bytes."""
        hashed = hashlib.blake2b(cluster_secret, digest_size=32, person=b"pd-serve CURVE").digest()
        secret = z85.encode(hashed)
        return cls(zmq.curve_public(secret), secret)


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


class Wire:
    """The sockets of one process. Lives on one event loop; `publisher` makes sockets for other threads."""

    def __init__(self, name: str, host: str, keys: CurveKeys) -> None:
        self.name = name
        self._host = host
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, tuple[str, zmq.Socket[bytes]]] = {}
        self._tasks = BackgroundTasks()
        self._bound: list[zmq.asyncio.Socket] = []
        self._strangers = RejectedPeerLog(name, host if is_local(host) else "an unknown address")
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """For pyzmq's authenticator: only the cluster's own key may connect."""
        return key == self._keys.public

    @staticmethod
    def decoder(kind: Any) -> Callable[[bytes], Any]:
        """What turns a received message's frame into one of `kind`. Raises: msgspec.MsgspecError."""
        return msgspec.msgpack.Decoder(kind).decode

    def listen(self, on_message: Callable[[list[bytes]], None]) -> str:
        """Binds an inbound socket; every message's frames go to `on_message`. Returns its address."""
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        self._tasks.start(self._strangers.watch(socket))
        port = socket.bind_to_random_port(f"tcp://{self._host}")
        self._bound.append(socket)
        self._tasks.start(self._receive(socket, on_message))
        return f"tcp://{self._host}:{port}"

    def connect(self, peer: str, address: str) -> None:
        """Names a peer's address. A new address replaces the old one."""
        known = self._peers.get(peer)
        if known is not None:
            if known[0] == address:
                return
            known[1].close(linger=0)
        self._peers[peer] = (address, self.publisher(address))

    def disconnect(self, peer: str) -> None:
        if (known := self._peers.pop(peer, None)) is not None:
            known[1].close(linger=0)

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        """Sends a tagged message and raw frames. Never blocks; False if the peer is not known or too slow."""
        known = self._peers.get(peer)
        if known is None:
            return False
        frames = [self.name.encode(), msgspec.msgpack.encode(message), *payload]
        try:
            known[1].send_multipart(frames, zmq.NOBLOCK, copy=True)
        except zmq.Again:
            logger.warning("%s does not read: a %s is dropped", peer, type(message).__name__)
            return False
        return True

    def publisher(self, address: str) -> "zmq.Socket[bytes]":
        """A socket that sends to `address`; whoever asks for it owns it, on a thread of its own."""
        socket: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, 0)
        socket.curve_serverkey = self._keys.public
        socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        socket.connect(address)
        return socket

    async def close(self) -> None:
        await self._tasks.cancel()
        for peer in list(self._peers):
            self.disconnect(peer)
        for socket in self._bound:
            socket.close(linger=0)
        self._authenticator.stop()
        self._context.destroy(linger=0)

    async def _receive(self, socket: zmq.asyncio.Socket, on_message: Callable[[list[bytes]], None]) -> None:
        while True:
            try:
                frames = await socket.recv_multipart()
            except zmq.Again:
                continue  # a peer was lost in the middle of a message, whose beginning is thrown away
            try:
                on_message(frames)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger.warning("a message that makes no sense was ignored: %s", error)
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("handling a message failed")
