"""The network of a cluster with faults: encoded messages on connections that can be slow, cut or lossy."""

import contextvars
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd_serve.comm.message_wire import OnFrames, OnMessage
from pd_serve.comm.messages import TokenHeader
from pd_serve.comm.outputs import OutputBatch, RequestOutput
from pd_serve.simulated_engine.outputs import SimulatedBatch, SimulatedCodec, SimulatedOutput
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.faults.process_loop import PROCESS, ProcessLoop
from pd_serve.simulation.simulated_network import SimulatedFabric, VirtualWire

#: Delay of the second delivery of a duplicated message, in seconds.
DUPLICATE_AFTER_S = 0.03

_decode_outputs = msgspec.msgpack.Decoder(list[SimulatedOutput]).decode
_decode_header = msgspec.msgpack.Decoder(TokenHeader).decode


@dataclass
class FaultyLink:
    """All connections from one process to another, by their names.

    Attributes:
        delay_s: Added to the latency of each message.
        cuts: Number of partitions in effect. The messages wait for the end of all of them.
        loss, duplication: Probabilities.
        held: The waiting messages.
    """

    delay_s: float = 0.0
    cuts: int = 0
    loss: float = 0.0
    duplication: float = 0.0
    held: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.delay_s or self.cuts or self.loss or self.duplication)


class FaultyNetwork:
    """Delivers encoded messages, in order on each connection, and not in order between connections.

    Attributes:
        on_send: Called with (sender, receiver, type of the message, message) before a message is sent.
        lost_next: How many messages of a type are lost next.
        on_listen: Each is called with the name of a process that begins to listen.
        dropped: Number of lost messages by type.
    """

    def __init__(
        self, loop: ProcessLoop, rng: random.Random, settings: NetworkSettings, scale: float
    ) -> None:
        self.fabric = FaultyFabric(settings, scale)
        self.on_send: Callable[[str, str, str, object], None] = lambda sender, receiver, kind, message: None
        self.on_listen: list[Callable[[str], None]] = []
        self.lost_next: dict[str, int] = {}
        self.dropped: dict[str, int] = defaultdict(int)
        self._loop = loop
        self._rng = rng
        self._latency_s = settings.message_latency_s
        self._links: defaultdict[tuple[str, str], FaultyLink] = defaultdict(FaultyLink)
        self._listeners: dict[str, tuple[contextvars.Context, OnFrames]] = {}
        self._arrivals: dict[tuple[str, str], float] = {}  # of the last message, by sender and address
        self._ports = 0

    def link(self, sender: str, receiver: str) -> FaultyLink:
        return self._links[sender, receiver]

    def heal(self, sender: str, receiver: str, *, reset: bool = False) -> None:
        """Ends one partition of a link. The waiting messages are delivered, or are lost with a reset."""
        link = self._links[sender, receiver]
        link.cuts -= 1
        if link.cuts == 0:
            held, link.held = link.held, []
            for deliver in held:
                if not reset:
                    deliver()

    def problems(self) -> list[str]:
        """Faults that have not ended."""
        unclean = [f"{a} -> {b}" for (a, b), link in self._links.items() if not link.is_clean or link.held]
        return [f"network: {name} is not healed" for name in unclean]

    # ---- for wires

    def listen(self, name: str, on_frames: OnFrames) -> str:
        """Adds a listener of the running process. Returns its address, which nothing had before."""
        self._ports += 1
        address = f"{name}/{self._ports}"
        self._listeners[address] = (contextvars.copy_context(), on_frames)
        for listening in self.on_listen:
            listening(name)
        return address

    def silence(self, address: str) -> None:
        self._listeners.pop(address, None)

    def listens(self, address: str) -> bool:
        """Whether a living process has this address."""
        context, _ = self._listeners.get(address, (None, None))
        return context is not None and self._loop.is_alive(context.get(PROCESS, ""))

    def transmit(self, sender: str, address: str, kind: str, message: object, frames: list[bytes]) -> None:
        """Sends the frames of a message; they are lost if the address has no listener on arrival."""
        receiver = address.rpartition("/")[0]
        self.on_send(sender, receiver, kind, message)
        if self.lost_next.get(kind, 0) > 0:
            self.lost_next[kind] -= 1
            self.dropped[kind] += 1
            return
        link = self._links.get((sender, receiver))
        if link is None:
            return self._deliver(sender, address, frames, 0.0)
        if link.loss and self._rng.random() < link.loss:
            self.dropped[kind] += 1
            return
        copies = 1 + (link.duplication > 0 and self._rng.random() < link.duplication)
        for copy in range(copies):
            if link.cuts:
                link.held.append(lambda: self._deliver(sender, address, frames, 0.0))
            else:
                self._deliver(sender, address, frames, link.delay_s + copy * DUPLICATE_AFTER_S, copy > 0)

    def _deliver(
        self, sender: str, address: str, frames: list[bytes], delay_s: float, is_copy: bool = False
    ) -> None:
        listener = self._listeners.get(address)
        if listener is None:
            return
        context, on_frames = listener
        connection = (sender, address)
        at = self._loop.now + self._latency_s * (0.5 + self._rng.random()) + delay_s
        if not is_copy:
            at = self._arrivals[connection] = max(at, self._arrivals.get(connection, 0.0))
        self._loop.deliver_at(at, self._arrive, address, on_frames, frames, context=context)

    def _arrive(self, address: str, on_frames: OnFrames, frames: list[bytes]) -> None:
        if address in self._listeners:
            on_frames(frames)


class FaultyWire(VirtualWire):
    """Implements `pd_serve.comm.message_wire.MessageWire` with the encoding of production."""

    def __init__(self, name: str, network: FaultyNetwork) -> None:
        super().__init__(name, network)
        self._network = network
        self._sender = name.encode()
        #: The last message, which often goes to several peers.
        self._encoded: tuple[object, bytes] = (None, b"")

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        return super().listen_for_frames(self.failures.decoding(kind, on_message))

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        return super().listen_for_frames(self.failures.guarding(on_frames))

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        address = self.peers.get(peer)
        if address is None:
            self.unsent.peer_unknown()
            return False
        if message is not self._encoded[0]:
            self._encoded = message, msgspec.msgpack.encode(message)
        frames = [self._sender, self._encoded[1], *payload]
        self._network.transmit(self.name, address, type(message).__name__, message, frames)
        return True

    def send_to(self, address: str, frames: list[Any]) -> None:
        """Sends a step's tokens, or a report of requests, to the token endpoint of an API server."""
        header, batch = frames
        outputs = batch.outputs if isinstance(batch, SimulatedBatch) else []
        encoded = [msgspec.msgpack.encode(header), msgspec.msgpack.encode(outputs)]
        kind = "Tokens" if outputs else "RequestReport"
        self._network.transmit(self.name, address, kind, batch, encoded)

    async def close(self) -> None:
        await super().close()
        self.peers.clear()


class EncodedOutputs:
    """Implements `pd_serve.frontend.output_codec.OutputCodec` for the tokens of a `FaultyWire`."""

    def __init__(self) -> None:
        self._codec = SimulatedCodec()

    def decode(self, frames: Sequence[bytes]) -> tuple[TokenHeader, SimulatedBatch]:
        outputs: list[RequestOutput] = [*_decode_outputs(frames[1])]
        return _decode_header(frames[0]), SimulatedBatch(outputs)

    def prefill_s(self, batch: OutputBatch, output: RequestOutput) -> float | None:
        return self._codec.prefill_s(batch, output)

    def failed(self, request_id: str) -> SimulatedBatch:
        return self._codec.failed(request_id)


class FaultyFabric(SimulatedFabric):
    """KV copies between instances that may die while they read."""

    def __init__(self, settings: NetworkSettings, scale: float) -> None:
        super().__init__(settings, scale)
        self.timeout_s = 30.0
        self.reads: list[tuple[str, str]] = []  # in progress: source and destination

    def begin_read(self, source: str, destination: str) -> None:
        super().begin_read(source, destination)
        self.reads.append((source, destination))

    def end_read(self, source: str, destination: str) -> None:
        if (source, destination) in self.reads:
            self.reads.remove((source, destination))
            super().end_read(source, destination)

    def die(self, name: str) -> None:
        """An instance is dead: reads of it fail, and its own reads are over."""
        self.fail(name)
        for source, destination in list(self.reads):
            if destination == name:
                self.end_read(source, destination)
