"""Interface of a wire, on which one process exchanges messages, and the counter of failed message handlers.

`pd_serve.comm.wire.Wire` sends them over ZeroMQ, `pd_serve.simulation.simulated_network.SimulatedWire` in
virtual time.
"""

import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import msgspec

logger = logging.getLogger(__name__)

#: Takes the sender's name, the decoded message and further frames.
OnMessage = Callable[[str, Any, Sequence[bytes]], None]

#: Takes the frames of a message without decoding them.
OnFrames = Callable[[list[Any]], None]

#: What has failed: decoding a message, its handler, a remote call, or a task that a handler has started.
FailureKind = Literal["decode", "handler", "call", "task"]

#: Number of kinds of failures with a count of their own; all others share one count.
MAX_KINDS = 100


#: Minimum interval of log lines about messages to one peer that were dropped, in seconds.
LOG_INTERVAL_S = 10.0


class MessageWire(Protocol):
    """One-way messages, in order per sender.

    Attributes:
        name: Name of this process; receivers see it as the sender.
        failures: Failures of this process's message handlers.
        unsent: Messages of this process that could not be sent.
    """

    name: str
    failures: "HandlerFailures"
    unsent: "UnsentMessages"

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        """Receives messages of these types. Returns the address to send them to.

        Args:
            gathers: Messages are many, and not urgent: receives several at a time, after some milliseconds.
        """
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

    Attributes:
        by_kind: Number of failures by `FailureKind`, for metrics.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._counts: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter(dict.fromkeys(get_args(FailureKind), 0))

    def decoding(self, kind: Any, on_message: OnMessage) -> OnFrames:
        """A handler of frames: decodes messages of these types for `on_message`, and counts what fails."""
        decode = _decoder(kind)

        def on_frames(frames: list[bytes]) -> None:
            try:
                sender, message = frames[0].decode(), decode(frames[1])
            except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
                return self.record("decoding a message", error, "decode")
            self.handle(on_message, sender, message, frames[2:])

        return on_frames

    def handle(self, on_message: OnMessage, sender: str, message: object, payload: Sequence[bytes]) -> None:
        """Calls `on_message`, and counts its failure."""
        try:
            on_message(sender, message, payload)
        except Exception as error:
            self.record(f"handling {type(message).__name__} from {sender}", error)

    def guarding(self, on_frames: OnFrames) -> OnFrames:
        """A handler of frames that counts the failures of `on_frames`."""

        def handle(frames: list[Any]) -> None:
            try:
                on_frames(frames)
            except Exception as error:
                self.record("handling frames", error)

        return handle

    def record(self, what: str, error: BaseException, failure: FailureKind = "handler") -> None:
        """Counts and logs a failure.

        Args:
            what: The operation that failed, such as "handling Membership from manager".
        """
        kind = f"{what} failed: {type(error).__name__}: {error}"
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = "further failures in message handlers"
        self._counts[kind] += 1
        self.by_kind[failure] += 1
        logger.error("%s: %s failed", self._process, what, exc_info=error)

    def task_failed(self, error: BaseException) -> None:
        """Counts the failure of a task that a message handler has started."""
        self.record("a background task", error, "task")

    def __len__(self) -> int:
        return self._counts.total()

    def problems(self) -> list[str]:
        """One line per kind of failure."""
        return [f"{self._process}: {kind} ({count} times)" for kind, count in self._counts.items()]


class UnsentMessages:
    """Counts messages that were dropped because their peer is not connected or does not read.

    All state that messages carry is sent again, or reconciled; see `pd_serve.frontend.reconciler`.
    """

    def __init__(self) -> None:
        self._count = 0
        self._logged_at: dict[str, float] = {}

    def __len__(self) -> int:
        return self._count

    def peer_unknown(self) -> None:
        """Counts a message to a peer that is not connected."""
        self._count += 1

    def queue_full(self, peer: str, message: object) -> None:
        """Counts a message to a peer that does not read. Logs each peer once per `LOG_INTERVAL_S`."""
        self._count += 1
        now = time.monotonic()
        if now - self._logged_at.get(peer, -math.inf) < LOG_INTERVAL_S:
            return
        if len(self._logged_at) >= MAX_KINDS:
            self._logged_at.clear()
        self._logged_at[peer] = now
        logger.warning("%s does not read: a %s is dropped", peer, type(message).__name__)


@functools.cache
def _decoder(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.msgpack.Decoder(kind).decode
