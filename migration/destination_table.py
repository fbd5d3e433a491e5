"""The destination's side of a live migration: it drives the copy, and owns the request from its commit on.

    RESERVING ─▶ WAITING ⇄ COPYING          blocks are reserved, the request is invisible to the scheduler
                    │
                    ▼
                  TAIL ─▶ COMMITTING ─▶ COMMITTED     in the batch; kept in a log to answer questions

Every other way goes through DROPPING to ENDED with nothing held. STOPPING waits for what is in flight
first: blocks must not be freed while a copy still writes to them, and an engine that is still reserving
or committing (compiling a grammar, for one) would do so after the drop.
"""

from enum import StrEnum, auto

from migration.state_machine import Table, ignored


class DestinationState(StrEnum):
    RESERVING = auto()
    WAITING = auto()  # for the next stage, or the final state
    COPYING = auto()  # full blocks, while the source decodes
    TAIL = auto()  # the last blocks, while the request is suspended
    COMMITTING = auto()  # the engine takes the request into its batch
    COMMITTED = auto()
    STOPPING = auto()  # a copy or an engine call has to end before the blocks can go
    DROPPING = auto()
    ENDED = auto()


class DestinationEvent(StrEnum):
    RESERVED = auto()  # engine
    REFUSED = auto()  # engine
    STAGE = auto()  # source: these full blocks may be read
    FINAL = auto()  # source: suspended, these are the last blocks and the state
    KEEP_ALIVE = auto()  # source: still prefilling
    WITHDRAWN = auto()  # source: not any more
    QUERIED = auto()  # source: has it been committed?
    CONFIRMED = auto()  # source: what was read was whole
    COPIED = auto()  # transport
    COPY_FAILED = auto()  # transport, or no more blocks to copy into
    ENTERED = auto()  # engine: committed
    COMMIT_FAILED = auto()  # engine
    ENGINE_DONE = auto()  # engine: dropped
    TIMED_OUT = auto()  # the lease of the present state
    PEER_LOST = auto()  # the source is known to be dead


class DestinationAction(StrEnum):
    SEND_PULL = auto()
    SEND_REFUSED = auto()
    SEND_COMMITTED = auto()
    SEND_DROPPED = auto()
    COPY = auto()
    STOP_COPY = auto()
    COMMIT = auto()
    DROP = auto()  # undo whatever this migration brought here: a reservation, or a committed request
    PUBLISH = auto()  # the blocks may enter the prefix cache
    CLOSE = auto()


S, E, A = DestinationState, DestinationEvent, DestinationAction

_DROP = (S.DROPPING, (A.DROP,))
_STOP = (S.STOPPING, (A.STOP_COPY,))
_AWAIT_ENGINE = (S.STOPPING, ())
_LATE = (
    *(E.WITHDRAWN, E.PEER_LOST, E.TIMED_OUT),
    *(E.STAGE, E.FINAL, E.KEEP_ALIVE, E.QUERIED, E.CONFIRMED),
)

DESTINATION_TABLE: Table[DestinationState, DestinationEvent, DestinationAction] = {
    S.RESERVING: {
        E.RESERVED: (S.WAITING, (A.SEND_PULL,)),
        E.REFUSED: (S.ENDED, (A.SEND_REFUSED, A.CLOSE)),
        E.WITHDRAWN: _AWAIT_ENGINE,
        E.PEER_LOST: _AWAIT_ENGINE,
        **ignored(S.RESERVING, E.QUERIED, E.KEEP_ALIVE),
    },
    S.WAITING: {
        E.STAGE: (S.COPYING, (A.COPY,)),
        E.FINAL: (S.TAIL, (A.COPY,)),
        E.WITHDRAWN: _DROP,
        E.TIMED_OUT: _DROP,
        E.PEER_LOST: _DROP,
        E.QUERIED: (S.WAITING, (A.SEND_PULL,)),  # the final state got lost: ask for it
        E.KEEP_ALIVE: (S.WAITING, ()),
    },
    S.COPYING: {
        E.COPIED: (S.WAITING, (A.SEND_PULL,)),
        E.COPY_FAILED: _DROP,
        E.WITHDRAWN: _STOP,
        E.PEER_LOST: _STOP,
        E.TIMED_OUT: _STOP,
        E.STAGE: (S.COPYING, ()),  # repeated
        **ignored(S.COPYING, E.KEEP_ALIVE, E.QUERIED),
    },
    S.TAIL: {
        E.COPIED: (S.COMMITTING, (A.COMMIT,)),
        E.COPY_FAILED: _DROP,
        E.WITHDRAWN: _STOP,
        E.PEER_LOST: _STOP,
        E.TIMED_OUT: _STOP,
        E.FINAL: (S.TAIL, ()),  # repeated
        E.QUERIED: (S.TAIL, ()),  # the answer follows in a moment
        **ignored(S.TAIL, E.STAGE, E.KEEP_ALIVE),
    },
    S.COMMITTING: {
        E.ENTERED: (S.COMMITTED, (A.SEND_COMMITTED,)),
        E.COMMIT_FAILED: _DROP,
        E.WITHDRAWN: _AWAIT_ENGINE,  # the drop undoes the commit
        E.PEER_LOST: (S.COMMITTING, ()),  # the request is about to run here
        **ignored(S.COMMITTING, E.FINAL, E.STAGE, E.KEEP_ALIVE, E.QUERIED),
    },
    S.COMMITTED: {
        E.FINAL: (S.COMMITTED, (A.SEND_COMMITTED,)),  # idempotent
        E.QUERIED: (S.COMMITTED, (A.SEND_COMMITTED,)),
        E.CONFIRMED: (S.COMMITTED, (A.PUBLISH,)),
        E.WITHDRAWN: _DROP,
        E.TIMED_OUT: (S.ENDED, (A.CLOSE,)),  # the source no longer asks
        **ignored(S.COMMITTED, E.STAGE, E.KEEP_ALIVE, E.PEER_LOST),
    },
    S.STOPPING: {
        E.COPIED: _DROP,
        E.COPY_FAILED: _DROP,
        E.RESERVED: _DROP,
        E.REFUSED: _DROP,
        E.ENTERED: _DROP,
        E.COMMIT_FAILED: _DROP,
        **ignored(S.STOPPING, *_LATE),
    },
    S.DROPPING: {
        E.ENGINE_DONE: (S.ENDED, (A.SEND_DROPPED, A.CLOSE)),
        **ignored(S.DROPPING, *_LATE),
    },
    S.ENDED: {
        E.FINAL: (S.ENDED, (A.SEND_DROPPED,)),
        E.STAGE: (S.ENDED, (A.SEND_DROPPED,)),
        E.QUERIED: (S.ENDED, (A.SEND_DROPPED,)),
        E.KEEP_ALIVE: (S.ENDED, (A.SEND_DROPPED,)),
        E.WITHDRAWN: (S.ENDED, (A.SEND_DROPPED,)),
        **ignored(S.ENDED, E.PEER_LOST, E.CONFIRMED),
    },
}
