"""What must hold of the source's table, computed from the table itself.

The request belongs to the source until the commit is acknowledged, and every wait has an end that does
not depend on the destination.
"""

import pytest

from migration.source_table import SOURCE_TABLE, SourceAction, SourceEvent, SourceState
from tests.unit.migration.table_paths import exits, reachable, steps, steps_with

S, E, A = SourceState, SourceEvent, SourceAction

ENDS = {S.COMMITTED, S.ABORTED}
FROM_PEER = {E.PULLED, E.REFUSED, E.DROPPED, E.ACKNOWLEDGED}
#: The request runs here and nothing of it has been taken away.
RUNNING = {S.OFFERED, S.STAGING}
#: The destination may commit at any time.
IN_DOUBT = {S.SUSPENDED, S.ASKING}


@pytest.mark.parametrize("state", S)
def test_ends_by_itself_when_the_destination_is_silent(state: SourceState) -> None:
    alone = set(E) - FROM_PEER - {E.PEER_LOST, E.CANCELLED}
    assert reachable(SOURCE_TABLE, state, alone) & ENDS


@pytest.mark.parametrize("state", sorted(set(S) - ENDS - {S.RETREATING, S.RELEASING}))
def test_leaves_every_wait_for_the_destination_when_that_is_lost(state: SourceState) -> None:
    next_state, actions = SOURCE_TABLE[state][E.PEER_LOST]
    assert next_state is (S.ABORTED if state in RUNNING else S.RETREATING)
    assert (A.RESUME in actions) == (state not in RUNNING)


@pytest.mark.parametrize("state", sorted(set(S) - ENDS - {S.RELEASING}))
def test_a_migration_ends_at_once_with_its_request(state: SourceState) -> None:
    next_state, actions = SOURCE_TABLE[state][E.GONE]
    assert next_state is S.ABORTED
    assert A.CLOSE in actions
    assert A.RESUME not in actions
    assert A.RELEASE not in actions
    # The destination holds something for it. RETREATING has told it already, or has been told.
    assert (A.SEND_WITHDRAW in actions) == (state is not S.RETREATING)


@pytest.mark.parametrize("state", sorted(set(S) - ENDS))
def test_every_state_handles_end_loss_and_cancellation(state: SourceState) -> None:
    """No state forbids the request to end, the peer to die, or the instance to change its mind."""
    assert {E.GONE, E.PEER_LOST, E.CANCELLED} <= set(SOURCE_TABLE[state])


@pytest.mark.parametrize("state", sorted(set(S) - ENDS))
def test_every_state_handles_its_bound(state: SourceState) -> None:
    """What the driver's timer feeds is allowed wherever it is armed, and leaves or reminds."""
    next_state, actions = SOURCE_TABLE[state][E.TIMED_OUT]
    engine_only = state in {S.RETREATING, S.RELEASING}
    assert next_state is not state or actions or engine_only


def test_releases_only_what_has_been_acknowledged() -> None:
    releasing = steps_with(SOURCE_TABLE, A.RELEASE)
    assert {(step.state, step.event) for step in releasing} == {(s, E.ACKNOWLEDGED) for s in IN_DOUBT}
    assert {step.state for step in steps(SOURCE_TABLE) if step.next_state is S.RELEASING} == {
        *IN_DOUBT,
        S.RELEASING,
    }
    assert {step.state for step in exits(SOURCE_TABLE, set(S) - {S.COMMITTED})} == {S.RELEASING}


def test_after_the_final_state_there_are_three_ways_out() -> None:
    """Released because acknowledged, resumed, or gone. A resume that nobody has allowed withdraws."""
    final = steps_with(SOURCE_TABLE, A.SEND_FINAL)
    assert {step.next_state for step in final} == {S.SUSPENDED}
    for step in exits(SOURCE_TABLE, IN_DOUBT):
        if step.event is E.ACKNOWLEDGED:
            assert step.actions == (A.SEND_CONFIRMED, A.RELEASE)
        elif step.event is E.GONE:
            assert step.actions == (A.SEND_WITHDRAW, A.CLOSE)
        elif step.event is E.DROPPED:
            assert step.actions == (A.RESUME,)
        else:
            assert step.actions == (A.SEND_WITHDRAW, A.RESUME)
            assert step.event in {E.PEER_LOST, E.GAVE_UP}  # never for a mere delay


def test_a_suspended_request_is_resumed_released_or_gone() -> None:
    """ADVANCING may have suspended it already: the answer is on its way."""
    for step in exits(SOURCE_TABLE, {S.ADVANCING, *IN_DOUBT}):
        kept_running = step.event is E.STAGE_READY
        assert kept_running or step.event is E.GONE or {A.RESUME, A.RELEASE} & set(step.actions)


def test_a_late_commit_of_a_request_taken_back_is_withdrawn() -> None:
    for state in (S.RETREATING, S.ABORTED):
        assert SOURCE_TABLE[state][E.ACKNOWLEDGED] == (state, (A.SEND_WITHDRAW,))


def test_a_commit_is_never_withdrawn_once_it_has_been_accepted() -> None:
    for step in steps(SOURCE_TABLE):
        if step.state in {S.RELEASING, S.COMMITTED}:
            assert A.SEND_WITHDRAW not in step.actions
            assert step.next_state in {S.RELEASING, S.COMMITTED}


def test_closes_once_on_every_way() -> None:
    for step in steps(SOURCE_TABLE):
        enters = step.state not in ENDS and step.next_state in ENDS
        assert step.actions.count(A.CLOSE) == (1 if enters else 0)
        assert step.state not in ENDS or step.next_state is step.state


def test_one_engine_call_at_a_time() -> None:
    """ADVANCE is asked on entering ADVANCING only: the engine takes one `next_stage` per request."""
    for step in steps(SOURCE_TABLE):
        entered = step.next_state is S.ADVANCING and step.state is not S.ADVANCING
        assert (A.ADVANCE in step.actions) == entered
