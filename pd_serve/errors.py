"""Errors of pd-serve, as one tree. What the engines and the migration raise is defined in `migration.errors`.

PdServeError
├── InvalidRequestError        the caller asked for something that cannot be done; HTTP 400
│   └── UnknownTargetError     the named request or instance does not exist (any more); HTTP 404
├── MigrationRefusedError      the service refuses a migration or an operation; HTTP 409
├── OverloadedError            too many requests are waiting already; HTTP 429
│   └── RequestRefusedError    this request in particular has to wait outside; HTTP 429 with a code
├── EngineDeadError            no live instance, or this one's engine has stopped; HTTP 503
├── ProtocolError              an event that the state table does not allow
└── MigrationError             a migration ended without moving the request; has a code; reaches no client
    ├── DestinationRefusedError   the destination cannot take the request; nothing was reserved
    ├── PeerLostError             the other side, or the path to it, is gone
    └── SourceGoneError           the request finished, was aborted or was preempted at the source
"""

from migration.errors import (
    DestinationRefusedError,
    EngineDeadError,
    InvalidRequestError,
    MigrationError,
    OverloadedError,
    PdServeError,
    PeerLostError,
    ProtocolError,
    Refusal,
    RefusalCode,
    SourceGoneError,
)

__all__ = [
    "DestinationRefusedError",
    "EngineDeadError",
    "InvalidRequestError",
    "MigrationError",
    "MigrationRefusedError",
    "OverloadedError",
    "PdServeError",
    "PeerLostError",
    "ProtocolError",
    "Refusal",
    "RefusalCode",
    "RequestRefusedError",
    "SourceGoneError",
    "UnknownTargetError",
]


class UnknownTargetError(InvalidRequestError):
    """The named request or instance does not exist (any more). HTTP 404."""


class RequestRefusedError(OverloadedError):
    """A request is refused, although others may wait. HTTP 429.

    Attributes:
        code: The reason, for programs: `code` of the error's body, and a label of the metric.
        retry_after_s: Seconds after which it may be sent again.
    """

    def __init__(self, text: str, code: str, retry_after_s: int) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after_s = retry_after_s


class MigrationRefusedError(PdServeError):
    """A migration or an operation was refused; the message says why, and requests go on. HTTP 409.

    Attributes:
        code: The reason, if a migration was refused.
    """

    def __init__(self, text: str, code: RefusalCode | None = None) -> None:
        super().__init__(text)
        self.code = code
