"""What must hold of the destination's table, computed from the table itself.

Nothing stays reserved without an end of its own, nothing is freed under a copy or an engine call in
flight, and a commit is announced only when the request is in the batch.
"""

import pytest

from migration.destination_table import (
    DESTINATION_TABLE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
)
from tests.unit.migration.table_paths import exits, reachable, steps, steps_with

S, E, A = DestinationState, DestinationEvent, DestinationAction

FROM_PEER = {E.STAGE, E.FINAL, E.KEEP_ALIVE, E.WITHDRAWN, E.QUERIED, E.CONFIRMED}
#: How what is in flight in a state ends. Until then nothing may be freed.
ENDS_OF_FLIGHT = {
    S.RESERVING: {E.RESERVED, E.REFUSED},
    S.COPYING: {E.COPIED, E.COPY_FAILED},
    S.TAIL: {E.COPIED, E.COPY_FAILED},
    S.COMMITTING: {E.ENTERED, E.COMMIT_FAILED},
}
ANY_END_OF_FLIGHT = set().union(*ENDS_OF_FLIGHT.values())


@pytest.mark.parametrize("state", S)
def test_ends_by_itself_when_the_source_is_silent(state: DestinationState) -> None:
    alone = set(E) - FROM_PEER - {E.PEER_LOST}
    assert S.ENDED in reachable(DESTINATION_TABLE, state, alone)


@pytest.mark.parametrize("state", sorted(set(S) - {S.ENDED, S.COMMITTING, S.COMMITTED}))
@pytest.mark.parametrize("event", [E.PEER_LOST, E.WITHDRAWN])
def test_gives_everything_back_when_the_source_is_lost_or_withdraws(
    state: DestinationState, event: DestinationEvent
) -> None:
    next_state, _ = DESTINATION_TABLE[state][event]
    assert next_state in {S.STOPPING, S.DROPPING}


def test_a_request_being_committed_survives_its_source() -> None:
    """The front end recomputes the request under a higher epoch, or follows this one: both are right."""
    for state in (S.COMMITTING, S.COMMITTED):
        assert DESTINATION_TABLE[state][E.PEER_LOST] == (state, ())


def test_a_withdrawn_commit_is_undone() -> None:
    assert DESTINATION_TABLE[S.COMMITTED][E.WITHDRAWN] == (S.DROPPING, (A.DROP,))
    assert DESTINATION_TABLE[S.COMMITTING][E.WITHDRAWN] == (S.STOPPING, ())


@pytest.mark.parametrize("state", [S.WAITING, S.COPYING, S.TAIL])
def test_every_wait_for_the_source_has_a_lease(state: DestinationState) -> None:
    next_state, _ = DESTINATION_TABLE[state][E.TIMED_OUT]
    assert next_state in {S.STOPPING, S.DROPPING}


def test_a_commit_is_acknowledged_only_after_it() -> None:
    saying = steps_with(DESTINATION_TABLE, A.SEND_COMMITTED)
    assert saying
    assert {step.next_state for step in saying} == {S.COMMITTED}
    entering = [step for step in steps(DESTINATION_TABLE) if step.next_state is S.COMMITTED]
    assert {step.state for step in entering} == {S.COMMITTING, S.COMMITTED}
    assert [step.event for step in exits(DESTINATION_TABLE, {S.COMMITTING}) if step in entering] == [
        E.ENTERED
    ]


def test_ends_with_nothing_held() -> None:
    """Into ENDED lead: nothing was reserved, dropped, or the request lives here and nobody asks any more."""
    assert {(step.state, step.event) for step in exits(DESTINATION_TABLE, set(S) - {S.ENDED})} == {
        (S.RESERVING, E.REFUSED),
        (S.DROPPING, E.ENGINE_DONE),
        (S.COMMITTED, E.TIMED_OUT),
    }
    for step in steps(DESTINATION_TABLE):
        into_dropping = step.next_state is S.DROPPING and step.state is not S.DROPPING
        assert (A.DROP in step.actions) == into_dropping


@pytest.mark.parametrize("state", ENDS_OF_FLIGHT)
def test_nothing_is_dropped_while_a_copy_or_call_is_in_flight(state: DestinationState) -> None:
    """The end of the flight drops; everything else that ends the migration goes to STOPPING and waits."""
    for event, (next_state, actions) in DESTINATION_TABLE[state].items():
        if event in ENDS_OF_FLIGHT[state]:
            assert A.STOP_COPY not in actions
        elif next_state is not state:
            assert next_state is S.STOPPING
            assert actions == ((A.STOP_COPY,) if state in {S.COPYING, S.TAIL} else ())
        else:
            assert actions == ()


def test_stopping_waits_for_the_copy_or_call_in_flight() -> None:
    row = DESTINATION_TABLE[S.STOPPING]
    for event, (next_state, actions) in row.items():
        if event in ANY_END_OF_FLIGHT:
            assert (next_state, actions) == (S.DROPPING, (A.DROP,))
        else:
            assert (next_state, actions) == (S.STOPPING, ())
    assert set(row) >= ANY_END_OF_FLIGHT


def test_one_copy_or_call_is_in_flight_at_a_time() -> None:
    begins = {A.COPY: {S.COPYING, S.TAIL}, A.COMMIT: {S.COMMITTING}}
    for step in steps(DESTINATION_TABLE):
        for action, states in begins.items():
            assert (action in step.actions) == (
                step.next_state in states and step.state is not step.next_state
            )


@pytest.mark.parametrize("state", sorted(set(S) - {S.RESERVING, S.WAITING}))
def test_answers_every_question_sooner_or_later(state: DestinationState) -> None:
    """Not a word gets lost: either the answer is at hand, or what the state waits for brings one."""
    next_state, actions = DESTINATION_TABLE[state][E.QUERIED]
    assert next_state is state
    answers = {S.COMMITTED: (A.SEND_COMMITTED,), S.ENDED: (A.SEND_DROPPED,)}
    assert actions == answers.get(state, ())
    if state not in answers:
        later = [step for step in exits(DESTINATION_TABLE, {state}) if step.event not in FROM_PEER]
        assert later


def test_waiting_asks_for_a_lost_final_state() -> None:
    assert DESTINATION_TABLE[S.WAITING][E.QUERIED] == (S.WAITING, (A.SEND_PULL,))


def test_closes_once_on_every_way() -> None:
    for step in steps(DESTINATION_TABLE):
        enters = step.state is not S.ENDED and step.next_state is S.ENDED
        assert step.actions.count(A.CLOSE) == (1 if enters else 0)
        assert step.state is not S.ENDED or step.next_state is S.ENDED


def test_blocks_are_published_only_when_the_source_has_confirmed_a_commit() -> None:
    publishing = steps_with(DESTINATION_TABLE, A.PUBLISH)
    assert [(step.state, step.event) for step in publishing] == [(S.COMMITTED, E.CONFIRMED)]
