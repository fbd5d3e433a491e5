"""The simulated wire of one process under test: what it sends is kept, and messages reach it encoded."""

from collections.abc import Sequence
from typing import Any

import msgspec

from pd_serve.comm.wire import Wire
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.simulated_network import OnFrames, SimulatedNetwork, SimulatedWire


class RecordingWire(SimulatedWire):
    """Belongs to the running event loop.

    Attributes:
        sent: Peer, message and payload of everything sent to connected peers.
        listeners: Of the process, in the order in which it began to listen.
    """

    decoder = staticmethod(Wire.decoder)

    def __init__(self, name: str) -> None:
        super().__init__(name, SimulatedNetwork(NetworkSettings(), 1.0))
        self.sent: list[tuple[str, Any, list[bytes]]] = []
        self.listeners: list[OnFrames] = []

    def listen(self, on_message: OnFrames) -> str:
        self.listeners.append(on_message)
        return super().listen(on_message)

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        connected = super().send(peer, message, payload)
        if connected:
            self.sent.append((peer, message, list(payload)))
        return connected

    def receive(self, sender: str, message: object, payload: Sequence[bytes] = ()) -> None:
        """Delivers a message to the process at once, encoded as on a real wire."""
        self.listeners[0]([sender.encode(), msgspec.msgpack.encode(message), *payload])
