"""Interface of a wire, on which one process exchanges messages, and the counter of failed message handlers.

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

#: Takes the frames of a message without decoding them.
OnFrames = Callable[[list[Any]], None]

#: Number of kinds of failures with a count of their own; all others share one count.
MAX_KINDS = 100


class MessageWire(Protocol):
    """One-way messages, in order per sender.

    Attributes:
        name: Name of this process; receivers see it as the sender.
        failures: Failures of this process's message handlers.
    """

    name: str
    failures: "HandlerFailures"

    def listen(self, kind: Any, on_message: OnMessage) -> str:
        """Receives messages of these types. Returns the address to send them to."""
        ...

    def listen_for_frames(self, on_frames: OnFrames) -> str:
        """Receives messages without decoding them. Returns the address to send them to."""
        ...

    def connect(self, peer: str, address: str) -> None:
        """Sets a peer's address. A new address replaces the old one."""
        ...

    def disconnect(self, peer: str) -> None:
        """Removes a peer. Unknown peers are ignored."""
        ...

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        """Sends a message and frames without blocking. False if the peer is unknown or does not read."""
        ...

    async def close(self) -> None: ...


class HandlerFailures:
    """Counts messages that could not be decoded or whose handler failed. Each is a bug.

    The process continues, and `GET /cluster/integrity` lists the failures.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._counts: Counter[str] = Counter()

    def record(self, what: str, error: BaseException) -> None:
        """Counts and logs a failure.

        Args:
            what: The operation that failed, such as "handling Membership from manager".
        """
        kind = f"{what} failed: {type(error).__name__}: {error}"
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = "further failures in message handlers"
        self._counts[kind] += 1
        logger.error("%s: %s failed", self._process, what, exc_info=error)

    def task_failed(self, error: BaseException) -> None:
        """Counts the failure of a task that a message handler has started."""
        self.record("a background task", error)

    def __len__(self) -> int:
        return self._counts.total()

    def problems(self) -> list[str]:
        """One line per kind of failure."""
        return [f"{self._process}: {kind} ({count} times)" for kind, count in self._counts.items()]
