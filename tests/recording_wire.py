"""The fake wire of the unit tests: records sent messages, and delivers the messages of a test."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from pd_serve.comm.message_wire import HandlerFailures, OnFrames, OnMessage, UnsentMessages

M = TypeVar("M")


class RecordingWire:
    """Implements `pd_serve.comm.message_wire.MessageWire`. Messages are encoded and decoded as on sockets.

    Attributes:
        peers: Addresses of the connected peers.
        sent: (peer, message, further frames) of everything sent to a connected peer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = HandlerFailures(name)
        self.unsent = UnsentMessages()
        self.peers: dict[str, str] = {}
        self.sent: list[tuple[str, Any, list[bytes]]] = []
        self._decode: Callable[[bytes], Any]
        self._on_message: OnMessage
        self._on_frames: OnFrames

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        self._decode, self._on_message = msgspec.msgpack.Decoder(kind).decode, on_message
        return f"tcp://{self.name}"

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        self._on_frames = on_frames
        return f"tcp://{self.name}/tokens"

    def connect(self, peer: str, address: str) -> None:
        self.peers[peer] = address

    def disconnect(self, peer: str) -> None:
        self.peers.pop(peer, None)

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        msgspec.msgpack.encode(message)
        if peer in self.peers:
            self.sent.append((peer, message, list(payload)))
        return peer in self.peers

    async def close(self) -> None: ...

    # ---- for the test

    def hear(self, sender: str, message: object, *payload: bytes) -> None:
        """Delivers a message of the test."""
        self._on_message(sender, self._decode(msgspec.msgpack.encode(message)), payload)

    def hear_frames(self, *frames: bytes) -> None:
        """Delivers frames of the test without decoding them."""
        self._on_frames(list(frames))

    def sent_to(self, kind: type[M], peer: str | None = None) -> list[M]:
        """Messages of a kind, to one peer or to all."""
        return [m for to, m, _ in self.sent if isinstance(m, kind) and peer in (None, to)]

    def sent_with_peers(self, kind: type[M]) -> list[tuple[str, M]]:
        return [(to, m) for to, m, _ in self.sent if isinstance(m, kind)]
