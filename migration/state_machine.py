"""A protocol side as data: a literal table state → {event: (next state, actions)}.

The machine knows no time, no sockets and no engine. Events go in, actions come out; a driver
(`migration.outgoing`, `migration.incoming`) turns the outside world into events and performs the
actions. An event that the table does not list raises and changes nothing.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, Never, TypeVar

from migration.errors import ProtocolError

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)
A = TypeVar("A", bound=StrEnum)

Transition = tuple[S, tuple[A, ...]]
Table = Mapping[S, Mapping[E, Transition[S, A]]]


def ignored(state: S, *events: E) -> dict[E, tuple[S, tuple[Never, ...]]]:
    """Entries of a table for events that change nothing in this state."""
    return dict.fromkeys(events, (state, ()))


class StateMachine(Generic[S, E, A]):
    """One side of one migration.

    Attributes:
        state: Where it is now. An end state has an empty row, or one that lists late events only.
        history: Every (state, event, next state) so far, quoted in errors.
    """

    def __init__(self, table: Table[S, E, A], initial: S) -> None:
        self._table = table
        self.state = initial
        self.history: list[tuple[S, E, S]] = []

    def handle(self, event: E) -> tuple[A, ...]:
        """Moves to the next state.

        Returns:
            The actions to perform, in order.

        Raises:
            ProtocolError: The table has no such event in this state; nothing was changed.
        """
        try:
            next_state, actions = self._table[self.state][event]
        except KeyError:
            raise ProtocolError(
                f"{event} is not allowed in {self.state}; so far: {self.history_text()}"
            ) from None
        self.history.append((self.state, event, next_state))
        self.state = next_state
        return actions

    def history_text(self) -> str:
        """All events so far in one line, for logs and errors."""
        return " ".join(f"{state} -[{event}]->" for state, event, _ in self.history) + f" {self.state}"
