"""Questions about a state table: what can happen in it, whatever the world does."""

from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import NamedTuple, TypeVar

from migration.state_machine import Table

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)
A = TypeVar("A", bound=StrEnum)


class Step(NamedTuple):
    """One entry of a table, flat."""

    state: StrEnum
    event: StrEnum
    next_state: StrEnum
    actions: tuple[StrEnum, ...]


def steps(table: Table[S, E, A]) -> Iterator[Step]:
    for state, row in table.items():
        for event, (next_state, actions) in row.items():
            yield Step(state, event, next_state, actions)


def steps_with(table: Table[S, E, A], action: A) -> list[Step]:
    return [step for step in steps(table) if action in step.actions]


def exits(table: Table[S, E, A], states: Collection[S]) -> list[Step]:
    """The steps that lead out of these states."""
    return [step for step in steps(table) if step.state in states and step.next_state not in states]


def reachable(table: Table[S, E, A], begin: S, events: Collection[E]) -> set[S]:
    """Where one can get from `begin` if nothing but these events happens."""
    seen, todo = {begin}, [begin]
    while todo:
        for event, (next_state, _) in table[todo.pop()].items():
            if event in events and next_state not in seen:
                seen.add(next_state)
                todo.append(next_state)
    return seen
