"""The network of a simulated cluster: messages with latency, KV copies that share links.

`SimulatedWire` has the interface of `pd_serve.comm.wire.Wire`, `SimulatedFabric` that of the KV transport.
"""

import asyncio
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from migration.transport.local import LocalFabric
from pd_serve.comm.message_wire import HandlerFailures, OnFrames, OnMessage, UnsentMessages
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.message_faults import MessageFaults

#: Size of a control message on a link, in bytes.
MESSAGE_BYTES = 300


class SimulatedNetwork:
    """Delivers messages with latency. Messages of one sender stay in order.

    A message shares its sender's link with the outgoing copies.

    Attributes:
        faults: Loses, duplicates and holds messages; None for a network without faults.
    """

    def __init__(self, settings: NetworkSettings, kv_bytes_per_byte: float) -> None:
        self.settings = settings
        self.fabric = SimulatedFabric(settings, kv_bytes_per_byte)
        self.faults: MessageFaults | None = None
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[str, OnFrames] = {}
        self._cut: set[str] = set()
        self._arrives: dict[str, float] = {}  # arrival of the last message of a sender

    def listen(self, name: str, on_message: OnFrames) -> str:
        """Adds a listener. Returns its address."""
        address = next(a for n in itertools.count() if (a := f"{name}/{n}") not in self._listeners)
        self._listeners[address] = on_message
        return address

    def silence(self, address: str) -> None:
        self._listeners.pop(address, None)

    def cut(self, name: str) -> None:
        """Cuts a node off: all messages from and to it are lost, and reads of its KV fail."""
        self._cut.add(name)
        self.fabric.fail(name)

    def restore(self, name: str) -> None:
        """Ends `cut`."""
        self._cut.discard(name)
        self.fabric.restore(name)

    def deliver(self, sender: str, address: str, frames: list[Any]) -> None:
        """Sends frames to an address. They are lost if it has no listener on arrival."""
        if self._cut and sender in self._cut:
            return
        if self.faults is None:
            self._deliver(sender, address, frames)
        else:
            link, message = (sender, _node(address)), type(frames[1])
            # A copy for each delivery: receivers may change a message, and it may arrive twice.
            self.faults.transmit(link, message, lambda: self._deliver(sender, address, copy.deepcopy(frames)))

    def delay_s(self, sender: str) -> float:
        """Time that a message which is sent now takes."""
        latency_s = self.settings.message_latency_s
        if copies := self.fabric.leaving.get(sender):
            return latency_s + MESSAGE_BYTES * (copies + 1) / self.settings.kv_bytes_per_s
        return latency_s

    def _deliver(self, sender: str, address: str, frames: list[Any]) -> None:
        arrives = self._loop.time() + self.delay_s(sender)
        if arrives < (last := self._arrives.get(sender, 0.0)):
            arrives = last
        self._arrives[sender] = arrives
        self._loop.call_at(arrives, self._arrive, address, frames)

    def _arrive(self, address: str, frames: list[Any]) -> None:
        on_message = self._listeners.get(address)
        if on_message is not None and not (self._cut and _node(address) in self._cut):
            on_message(frames)


class Listeners(Protocol):
    """The addresses of a network in virtual time."""

    def listen(self, name: str, on_frames: OnFrames) -> str:
        """Adds a listener of a process. Returns its address."""
        ...

    def silence(self, address: str) -> None:
        """Removes a listener."""
        ...


class VirtualWire:
    """The peers and listeners of one process on a network in virtual time.

    Attributes:
        peers: Addresses of the connected peers.
    """

    def __init__(self, name: str, listeners: Listeners) -> None:
        self.name = name
        self.failures = HandlerFailures(name)
        self.unsent = UnsentMessages()
        self.peers: dict[str, str] = {}
        self._listeners = listeners
        self._bound: list[str] = []

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        self._bound.append(self._listeners.listen(self.name, on_frames))
        return self._bound[-1]

    def connect(self, peer: str, address: str) -> None:
        self.peers[peer] = address

    def disconnect(self, peer: str) -> None:
        self.peers.pop(peer, None)

    async def close(self) -> None:
        for address in self._bound:
            self._listeners.silence(address)
        self._bound.clear()


class SimulatedWire(VirtualWire):
    """Implements `pd_serve.comm.message_wire.MessageWire` for one process. Messages are not encoded."""

    def __init__(self, name: str, network: SimulatedNetwork) -> None:
        super().__init__(name, network)
        self._network = network

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        return self.listen_for_frames(
            lambda frames: self.failures.handle(on_message, frames[0], frames[1], frames[2:])
        )

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        address = self.peers.get(peer)
        if address is None:
            self.unsent.peer_unknown()
            return False
        self._network.deliver(self.name, address, [self.name, message, *payload])
        return True

    def send_to(self, address: str, frames: list[Any]) -> None:
        """Sends frames to an address without a peer: a step's tokens to the token endpoint."""
        self._network.deliver(self.name, address, frames)


class SimulatedFabric(LocalFabric):
    """KV copies between simulated instances, which take the time of a copy of real KV.

    Each instance has one link in each direction, and another bandwidth to other machines. A copy gets its
    share of the busier link, as it is when the copy begins.

    Args:
        kv_bytes_per_byte: Bytes of KV that one copied byte of simulated contents represents.

    Attributes:
        leaving, entering: Number of copies in progress by instance.
        on_change: By instance: called when a copy from it or to it begins or ends.
    """

    def __init__(self, settings: NetworkSettings, kv_bytes_per_byte: float) -> None:
        super().__init__(latency_s=settings.kv_latency_s, timeout_s=120.0)
        self.leaving: Counter[str] = Counter()
        self.entering: Counter[str] = Counter()
        self.on_change: dict[str, Callable[[], None]] = {}
        self.bytes_copied = 0.0
        self._settings = settings
        self._scale = kv_bytes_per_byte

    def begin_read(self, source: str, destination: str) -> None:
        self._count(source, destination, 1)

    def end_read(self, source: str, destination: str) -> None:
        self._count(source, destination, -1)

    def _count(self, source: str, destination: str, change: int) -> None:
        self.leaving[source] += change
        self.entering[destination] += change
        for instance in (source, destination):
            if (on_change := self.on_change.get(instance)) is not None:
                on_change()

    def copy_s(self, source: str, destination: str, num_bytes: int) -> float:
        self.bytes_copied += num_bytes * self._scale
        share = max(self.leaving[source], self.entering[destination], 1)
        return num_bytes * self._scale * share / self._settings.bytes_per_s(source, destination)


def _node(address: str) -> str:
    return address.rsplit("/", 1)[0]
