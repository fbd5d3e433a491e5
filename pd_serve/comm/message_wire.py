"""The messages of one process: what every kind of wire offers, and what becomes of failures in message
handlers.

`pd_serve.comm.wire.Wire` sends them over ZeroMQ, `pd_serve.simulation.simulated_network.SimulatedWire` in
virtual time.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

logger = logging.getLogger(__name__)

#: Takes the sender's name, the decoded message and further frames.
OnMessage = Callable[[str, Any, Sequence[bytes]], None]

#: Takes the frames of a message as they are.
OnFrames = Callable[[list[Any]], None]

#: Different failures that are counted apart; further ones are counted together.
MAX_KINDS = 100


class MessageWire(Protocol):
    """One-way messages, in order per sender.

    Attributes:
        name: Of this process, which receivers see as the sender.
        failures: Of its message handlers.
    """

    name: str
    failures: "HandlerFailures"

    def listen(self, kind: Any, on_message: OnMessage) -> str:
        """Takes messages of these types. Returns the address to send them to."""
        ...

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        """Takes messages without decoding them. Returns the address to send them to."""
        ...

    def connect(self, peer: str, address: str) -> None:
        """Sets a peer's address. A new address replaces the old one."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forgets a peer. Unknown peers are ignored."""
        ...

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        """Sends a message and further frames. Never blocks. False: the peer is unknown or does not read."""
        ...

    async def close(self) -> None: ...


class HandlerFailures:
    """Counts messages that could not be decoded or whose handler failed by a bug. There should be none.

    The process goes on, and `GET /cluster/integrity` shows them.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._counts: Counter[str] = Counter()

    def record(self, what: str, error: BaseException) -> None:
        """Args: `what` failed, such as "handling a Membership from manager"."""
        kind = f"{what} failed: {type(error).__name__}: {error}"
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = "further failures in message handlers"
        self._counts[kind] += 1
        logger.error("%s: %s failed", self._process, what, exc_info=error)

    def task_failed(self, error: BaseException) -> None:
        """For tasks that a message has started."""
        self.record("a background task", error)

    def __len__(self) -> int:
        return self._counts.total()

    def problems(self) -> list[str]:
        """One line per kind of failure."""
        return [f"{self._process}: {kind} ({count} times)" for kind, count in self._counts.items()]
