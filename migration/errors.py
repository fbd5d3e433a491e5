"""Errors of pd-serve that migration can raise, as one tree.

PdServeError
├── InvalidRequestError        the caller asked for something that cannot be
├── OverloadedError            too many requests are waiting already
├── EngineDeadError            no live instance, or this one's engine has stopped
└── MigrationError             a migration ended without moving the request; never reaches a client
    ├── DestinationRefusedError   the destination cannot take the request; nothing was reserved
    ├── PeerLostError             the other side, or the path to it, is gone
    ├── SourceGoneError           the request finished, was aborted or was preempted at the source
    └── ProtocolError             an event that the state table does not allow
"""


class PdServeError(Exception):
    """Base of all errors that pd-serve raises itself."""


class InvalidRequestError(PdServeError):
    """The caller asked for something that cannot be done; the message says what to change."""


class OverloadedError(PdServeError):
    """The service already holds as many waiting requests as it is configured to."""


class EngineDeadError(PdServeError):
    """There is no live instance, or this instance's engine has stopped."""


class MigrationError(PdServeError):
    """A migration ended without moving the request. The request itself goes on."""


class DestinationRefusedError(MigrationError):
    """The destination cannot take the request. It holds nothing for it."""


class PeerLostError(MigrationError):
    """The other instance, or the path to its memory, is gone."""


class SourceGoneError(MigrationError):
    """The request is no longer running at its source: finished, aborted or preempted."""


class ProtocolError(MigrationError):
    """An event arrived that the state table does not allow; nothing was changed."""
