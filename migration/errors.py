"""Errors that migration and engines can raise, and why migrations end without moving a request."""

from enum import StrEnum, auto

import msgspec


class RefusalCode(StrEnum):
    """Why a migration was refused, or ended without moving its request. The request itself goes on."""

    ADAPTER = auto()  # the destination cannot load the request's LoRA adapter
    ALREADY_HERE = auto()  # the destination has the request
    ALREADY_MIGRATING = auto()  # one migration of a request at a time
    AMBIGUOUS_REQUEST = auto()  # the id names several running requests
    CANCELLED = auto()  # the source gave the migration up
    COPY_FAILED = auto()  # in an unforeseen way
    FINISHED = auto()  # the request ended, or its client left
    GRAMMAR = auto()  # the destination cannot continue the request's structured output
    INCOMPATIBLE = auto()  # model, version or KV layout differ
    NO_ADAPTER_SLOT = auto()  # the destination's batch has other LoRA adapters
    NO_BATCH_SLOT = auto()  # the destination's batch is full
    NO_FREE_BLOCKS = auto()  # the destination's KV cache is full
    NOT_HERE = auto()  # the source does not have the request: it has ended, or moved on
    NOT_RUNNING = auto()  # waiting, preempted or suspended at the source
    PEER_LOST = auto()  # an instance, or the path to its memory, is gone
    PREEMPTED = auto()  # by its source, while it was being copied
    STOPPING = auto()  # the source shuts down
    SUPERSEDED = auto()  # the destination has a newer copy of the request
    TIMED_OUT = auto()  # a bound of the protocol has passed
    TOO_LONG = auto()  # prompt and max_tokens exceed the destination's maximum length
    TOO_MANY_MIGRATIONS = auto()  # at the source or the destination, at a time
    UNKNOWN_MIGRATION = auto()  # the destination holds nothing for it
    UNSUPPORTED_ENGINE = auto()  # migration is off on this instance
    UNSUPPORTED_REQUEST = auto()  # a streaming-input session, a KV transfer of its own...


class Refusal(msgspec.Struct, frozen=True):
    """Why a migration did not move its request.

    Attributes:
        code: For programs: metrics, logs, the 409 body of `POST /cluster/migrate`.
        text: For people.
    """

    code: RefusalCode
    text: str

    def prefixed(self, prefix: str) -> "Refusal":
        """The same refusal as seen from the other side."""
        return Refusal(self.code, f"{prefix}: {self.text}")


class PdServeError(Exception):
    """Base of all errors that pd-serve raises itself."""


class InvalidRequestError(PdServeError):
    """The caller asked for something that cannot be done; the message says what to change."""


class OverloadedError(PdServeError):
    """The service already holds as many waiting requests as it is configured to."""


class EngineDeadError(PdServeError):
    """There is no live instance, or this instance's engine has stopped."""


class ProtocolError(PdServeError):
    """An event arrived that the state table does not allow; nothing was changed."""


class MigrationError(PdServeError):
    """A migration ended without moving the request. The request itself goes on.

    Attributes:
        refusal: Why, with a code.
    """

    def __init__(self, code: RefusalCode, text: str) -> None:
        super().__init__(text)
        self.refusal = Refusal(code, text)


class DestinationRefusedError(MigrationError):
    """The destination cannot take the request. It holds nothing for it."""


class PeerLostError(MigrationError):
    """The other instance, or the path to its memory, is gone."""

    def __init__(self, text: str) -> None:
        super().__init__(RefusalCode.PEER_LOST, text)


class SourceGoneError(MigrationError):
    """The request is no longer running at its source: finished, aborted or preempted."""
