"""The machine does what its table says, for both real tables: every state with every event."""

from enum import StrEnum
from typing import Any

import pytest

from migration.destination_table import (
    DESTINATION_TABLE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
)
from migration.source_table import SOURCE_TABLE, SourceAction, SourceEvent, SourceState
from migration.state_machine import StateMachine
from pd_serve.errors import ProtocolError

SIDES: list[tuple[Any, ...]] = [
    (SOURCE_TABLE, SourceState, SourceEvent, SourceAction),
    (DESTINATION_TABLE, DestinationState, DestinationEvent, DestinationAction),
]
CASES = [
    pytest.param(table, state, event, id=f"{states.__name__}.{state.name}-{event.name}")
    for table, states, events, _ in SIDES
    for state in states
    for event in events
]


@pytest.mark.parametrize(("table", "state", "event"), CASES)
def test_only_listed_events_do_anything(table: Any, state: StrEnum, event: StrEnum) -> None:
    machine: StateMachine[Any, Any, Any] = StateMachine(table, state)
    if event in table[state]:
        next_state, actions = table[state][event]
        assert machine.handle(event) == actions
        assert machine.state is next_state
        assert machine.history == [(state, event, next_state)]
    else:
        with pytest.raises(ProtocolError, match=f"{event} is not allowed in {state}"):
            machine.handle(event)
        assert machine.state is state
        assert machine.history == []


@pytest.mark.parametrize(("table", "states", "events", "actions"), SIDES)
def test_tables_are_whole_and_closed(table: Any, states: Any, events: Any, actions: Any) -> None:
    """Every state has a row, every event and every action a use, and nothing else occurs."""
    entries = [entry for row in table.values() for entry in row.items()]
    assert set(table) == set(states)
    assert {event for event, _ in entries} == set(events)
    assert {next_state for _, (next_state, _) in entries} <= set(states)
    assert {action for _, (_, performed) in entries for action in performed} == set(actions)


def test_a_refused_event_quotes_the_history() -> None:
    machine = StateMachine(SOURCE_TABLE, SourceState.OFFERED)
    machine.handle(SourceEvent.PULLED)
    machine.handle(SourceEvent.STAGE_READY)
    told = "offered -[pulled]-> advancing -[stage_ready]-> staging"
    assert machine.history_text() == told
    with pytest.raises(ProtocolError) as caught:
        machine.handle(SourceEvent.ACKNOWLEDGED)
    assert str(caught.value) == f"acknowledged is not allowed in staging; so far: {told}"
    assert machine.history_text() == told
