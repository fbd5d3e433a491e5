"""ZeroMQ between the processes of a cluster: one inbound socket per process, one outbound socket per peer.

All traffic is one-way messages, in order per sender. Every socket uses CURVE with the cluster's key pair, on
loopback too: messages are encrypted, and a peer without the key is rejected. The name and the messages of a
peer with the key are trusted.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from migration.tasks import BackgroundTasks
from pd_serve.comm.message_wire import HandlerFailures, OnFrames, OnMessage, UnsentMessages
from pd_serve.comm.rejected_peers import RejectedPeerLog

#: Maximum number of messages queued for a peer that does not read, in sender and receiver each: 100 s of load
#: reports. The sender drops and counts further messages.
HIGH_WATER_MARK = 5_000

#: Maximum number of messages that are handled before other tasks run. On a busy event loop, where that takes
#: 0.1 s, a smaller one would be the limit of what a process receives.
MAX_BURST = 1_000

#: Pause after which messages that are not urgent are received together, in seconds: waking up for one takes
#: longer than reading it.
GATHER_S = 0.005

_POLLIN = int(zmq.POLLIN)

#: Maximum number of sockets, one for each peer; ZeroMQ's own is 1,023.
MAX_SOCKETS = 10_000

#: ZMTP heartbeats, in ms: a connection without an answer for the timeout is closed and opened again. What was
#: in it is lost, and reconciled.
HEARTBEAT_INTERVAL_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000

#: TCP keepalive: seconds until the first probe and between probes, and number of probes.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 3

#: Maximum length of a received frame, in bytes. It bounds the memory that a peer without the key can occupy.
#: The longest frame that pd-serve sends is a request, of at most `--max-body-bytes`.
MAX_FRAME_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The cluster's CURVE key pair (Z85), which admits a process to the cluster. Only Ray distributes it."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())

    @classmethod
    def of(cls, cluster_secret: bytes | None) -> "CurveKeys":
        """The pair of a given secret, or a random one."""
        return cls.generate() if cluster_secret is None else cls.derive(cluster_secret)

    @classmethod
    def derive(cls, cluster_secret: bytes) -> "CurveKeys":
        """The pair derived from a secret, which should have the entropy of a key of 32 bytes."""
        hashed = hashlib.blake2b(cluster_secret, digest_size=32, person=b"pd-serve CURVE").digest()
        secret = z85.encode(hashed)
        return cls(zmq.curve_public(secret), secret)


def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def _keep_alive(socket: "zmq.Socket[Any]") -> None:
    """Sets the options by which a connection whose other end is gone is noticed."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)


@dataclass(slots=True)
class _Peer:
    """Where a peer receives messages; `socket` is None before the first one."""

    address: str
    socket: "zmq.Socket[bytes] | None" = None


class Wire:
    """The sockets of one process. Used on one event loop; `publisher` makes sockets for other threads.

    A connection is opened for the first message: few pairs of many instances ever exchange one.
    """

    def __init__(self, name: str, host: str, keys: CurveKeys) -> None:
        self.name = name
        self._host = host
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._peers: dict[str, _Peer] = {}
        self._tasks = BackgroundTasks()
        self._bound: list[zmq.asyncio.Socket] = []
        self.failures = HandlerFailures(name)
        self.unsent = UnsentMessages()
        self._rejected = RejectedPeerLog(name, host if is_local(host) else "an unknown address")
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by pyzmq's authenticator: admits the cluster's own key only."""
        return key == self._keys.public

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        """See `MessageWire`. A message that cannot be decoded is counted and dropped."""
        return self._bind(self.failures.decoding(kind, on_message), GATHER_S if gathers else 0.0)

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        return self._bind(self.failures.guarding(on_frames))

    def _bind(self, on_frames: OnFrames, pause_s: float = 0.0) -> str:
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        _keep_alive(socket)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        self._tasks.start(self._rejected.watch(socket))
        port = socket.bind_to_random_port(f"tcp://{self._host}")
        self._bound.append(socket)
        self._tasks.start(self._receive(socket, on_frames, pause_s))
        return f"tcp://{self._host}:{port}"

    def connect(self, peer: str, address: str) -> None:
        """See `MessageWire`."""
        if (known := self._peers.get(peer)) is None or known.address != address:
            self.disconnect(peer)
            self._peers[peer] = _Peer(address)

    def disconnect(self, peer: str) -> None:
        if (known := self._peers.pop(peer, None)) is not None and known.socket is not None:
            known.socket.close(linger=0)

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        """See `MessageWire`."""
        known = self._peers.get(peer)
        if known is None:
            self.unsent.peer_unknown()
            return False
        if known.socket is None:
            known.socket = self.publisher(known.address)
        frames = [self.name.encode(), msgspec.msgpack.encode(message), *payload]
        try:
            known.socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
        except zmq.Again:
            self.unsent.queue_full(peer, message)
            return False
        return True

    def publisher(self, address: str) -> "zmq.Socket[bytes]":
        """A socket that sends to `address`. The caller owns it and may use it on another thread."""
        socket: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        _keep_alive(socket)
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

    async def _receive(self, socket: zmq.asyncio.Socket, on_frames: OnFrames, pause_s: float) -> None:
        """Reads all that has come. Awaiting a future for each message takes ten times as long."""
        inbox: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
        while True:
            if _read(inbox, on_frames):
                await asyncio.sleep(pause_s)
            else:
                await _readable(inbox)


def _read(inbox: "zmq.Socket[bytes]", on_frames: OnFrames) -> bool:
    """Handles up to `MAX_BURST` messages. Returns whether there was one."""
    for number in range(MAX_BURST):
        try:
            frames = inbox.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:  # also if a peer has died in the middle of a message: its first frames are dropped
            return number > 0
        on_frames(frames)
    return True


async def _readable(inbox: "zmq.Socket[bytes]") -> None:
    """Returns when a message has come.

    The descriptor says only that ZeroMQ has something to do, and only until that is done.
    Source: ZMQ_FD in libzmq's manual of zmq_getsockopt.
    """
    loop, descriptor = asyncio.get_running_loop(), int(inbox.get(zmq.FD))
    while not int(inbox.get(zmq.EVENTS)) & _POLLIN:
        signalled = asyncio.Event()
        loop.add_reader(descriptor, signalled.set)
        try:
            await signalled.wait()
        finally:
            loop.remove_reader(descriptor)
