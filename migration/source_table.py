"""The source's side of a live migration: it owns the request until the commit is acknowledged.

    OFFERED ─▶ ADVANCING ⇄ STAGING          the destination copies while the request decodes here
                   │
                   ▼
               SUSPENDED ⇄ ASKING           off the running list; the destination copies the tail
                   │
                   ▼
               RELEASING ─▶ COMMITTED       it lives there now, the blocks come back here

Every other way ends in ABORTED with the request running here, or gone for reasons of its own.
RETREATING takes a (perhaps) suspended request back; a request that is taken back after its final
state went out gets an epoch above the one that the destination would have used, so that whatever a
lost destination did, the front end follows this side (see `docs/migration.md`).
"""

from enum import StrEnum, auto

from migration.state_machine import Table, ignored


class SourceState(StrEnum):
    OFFERED = auto()  # the destination has been asked to reserve
    ADVANCING = auto()  # the engine decides at a step boundary: another stage, or suspend
    STAGING = auto()  # the destination copies full blocks; the request decodes on
    SUSPENDED = auto()  # final state sent; the destination copies the tail and commits
    ASKING = auto()  # no acknowledgement in time: asking instead of guessing
    RETREATING = auto()  # the engine puts the request back on the running list
    RELEASING = auto()  # the engine frees what the request held here
    COMMITTED = auto()
    ABORTED = auto()


class SourceEvent(StrEnum):
    PULLED = auto()  # destination: holds some blocks, what next?
    REFUSED = auto()  # destination: cannot take it
    DROPPED = auto()  # destination: gave up, holds nothing
    ACKNOWLEDGED = auto()  # destination: the request has entered its batch
    STAGE_READY = auto()  # engine: more full blocks are safe to read
    SUSPENDED = auto()  # engine: suspended and drained, here is the final state
    GONE = auto()  # engine: finished, aborted or preempted
    ENGINE_DONE = auto()  # engine: resumed, or released
    TIMED_OUT = auto()  # the bound of the present state has passed
    GAVE_UP = auto()  # asked as often as allowed
    PEER_LOST = auto()  # the destination is known to be dead
    CANCELLED = auto()  # this instance no longer wants to move it


class SourceAction(StrEnum):
    ADVANCE = auto()  # ask the engine for the next stage
    SEND_STAGE = auto()
    SEND_FINAL = auto()
    SEND_KEEP_ALIVE = auto()
    SEND_QUERY = auto()
    SEND_WITHDRAW = auto()
    SEND_CONFIRMED = auto()  # all that was read was whole
    RESUME = auto()
    RELEASE = auto()
    CLOSE = auto()  # report the outcome, give the slot back


S, E, A = SourceState, SourceEvent, SourceAction

_GIVE_UP = (S.ABORTED, (A.SEND_WITHDRAW, A.CLOSE))
_LET_GO = (S.ABORTED, (A.CLOSE,))
_RETREAT = (S.RETREATING, (A.RESUME,))
_WITHDRAW_AND_RETREAT = (S.RETREATING, (A.SEND_WITHDRAW, A.RESUME))
_RELEASE = (S.RELEASING, (A.SEND_CONFIRMED, A.RELEASE))

SOURCE_TABLE: Table[SourceState, SourceEvent, SourceAction] = {
    S.OFFERED: {
        E.PULLED: (S.ADVANCING, (A.ADVANCE,)),
        E.REFUSED: _LET_GO,
        E.DROPPED: _LET_GO,
        E.GONE: _GIVE_UP,
        E.TIMED_OUT: _GIVE_UP,
        E.PEER_LOST: _LET_GO,
        E.CANCELLED: _GIVE_UP,
    },
    S.ADVANCING: {
        E.STAGE_READY: (S.STAGING, (A.SEND_STAGE,)),
        E.SUSPENDED: (S.SUSPENDED, (A.SEND_FINAL,)),
        E.GONE: _GIVE_UP,
        E.TIMED_OUT: (S.ADVANCING, (A.SEND_KEEP_ALIVE,)),  # a long prefill: keep the reservation alive
        E.DROPPED: _RETREAT,
        E.PEER_LOST: _RETREAT,
        E.CANCELLED: _WITHDRAW_AND_RETREAT,
        E.PULLED: (S.ADVANCING, ()),  # repeated
    },
    S.STAGING: {
        E.PULLED: (S.ADVANCING, (A.ADVANCE,)),
        E.DROPPED: _LET_GO,
        E.GONE: _GIVE_UP,
        E.TIMED_OUT: _GIVE_UP,
        E.PEER_LOST: _LET_GO,
        E.CANCELLED: _GIVE_UP,
    },
    S.SUSPENDED: {
        E.ACKNOWLEDGED: _RELEASE,
        E.DROPPED: _RETREAT,
        E.PEER_LOST: _WITHDRAW_AND_RETREAT,
        E.TIMED_OUT: (S.ASKING, (A.SEND_QUERY,)),
        E.GAVE_UP: _WITHDRAW_AND_RETREAT,  # every answer was "no final state", and every one got lost
        E.GONE: _GIVE_UP,  # the client left: whatever the destination has made of it ends there too
        E.PULLED: (S.SUSPENDED, (A.SEND_FINAL,)),  # it has not seen the final state
        E.CANCELLED: (S.SUSPENDED, ()),  # too late; the destination decides
    },
    S.ASKING: {
        E.ACKNOWLEDGED: _RELEASE,
        E.DROPPED: _RETREAT,
        E.PEER_LOST: _WITHDRAW_AND_RETREAT,
        E.TIMED_OUT: (S.ASKING, (A.SEND_QUERY,)),
        E.GAVE_UP: _WITHDRAW_AND_RETREAT,
        E.GONE: _GIVE_UP,
        E.PULLED: (S.SUSPENDED, (A.SEND_FINAL,)),
        E.CANCELLED: (S.ASKING, ()),
    },
    S.RETREATING: {
        E.ENGINE_DONE: _LET_GO,
        E.GONE: _LET_GO,
        E.ACKNOWLEDGED: (S.RETREATING, (A.SEND_WITHDRAW,)),  # too late: it runs here again
        E.STAGE_READY: (S.RETREATING, ()),  # the answer that RESUME overtook
        **ignored(S.RETREATING, E.SUSPENDED, E.DROPPED, E.PULLED, E.PEER_LOST, E.CANCELLED, E.TIMED_OUT),
    },
    S.RELEASING: {
        E.ENGINE_DONE: (S.COMMITTED, (A.CLOSE,)),
        E.GONE: (S.RELEASING, ()),  # an abort here changes nothing any more
        **ignored(S.RELEASING, E.ACKNOWLEDGED, E.DROPPED, E.PULLED, E.PEER_LOST, E.CANCELLED, E.TIMED_OUT),
    },
    S.COMMITTED: {
        **ignored(S.COMMITTED, E.ACKNOWLEDGED, E.DROPPED, E.PULLED, E.GONE, E.PEER_LOST, E.CANCELLED),
    },
    S.ABORTED: {
        E.ACKNOWLEDGED: (S.ABORTED, (A.SEND_WITHDRAW,)),
        E.PULLED: (S.ABORTED, (A.SEND_WITHDRAW,)),
        **ignored(S.ABORTED, E.STAGE_READY, E.SUSPENDED, E.DROPPED, E.REFUSED, E.GONE),
        **ignored(S.ABORTED, E.ENGINE_DONE, E.PEER_LOST, E.CANCELLED),
    },
}
