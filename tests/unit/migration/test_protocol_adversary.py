"""Both state tables against the worst network, engines, timers and front end that the contracts allow.

Messages are lost, doubled and delayed as hypothesis likes, timers fire whenever they are armed, either side
may die, the client may leave, the source may preempt, the destination may refuse, fail or move the request
on at once. See `protocol_world` for the model and for what must hold.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from protocol_world import (
    DESTINATION,
    DS,
    FRESH,
    SOURCE,
    SS,
    THIRD,
    DestinationState,
    Fault,
    SourceState,
    World,
)

#: Where the faults set in: (source, destination).
PHASES: list[tuple[SourceState, DestinationState | None]] = [
    (SS.OFFERED, None),
    (SS.OFFERED, DS.RESERVING),
    (SS.ADVANCING, DS.WAITING),
    (SS.SUSPENDED, DS.WAITING),
    (SS.SUSPENDED, DS.TAIL),
    (SS.SUSPENDED, DS.COMMITTING),
    (SS.SUSPENDED, DS.COMMITTED),
    (SS.RELEASING, DS.COMMITTED),
]


def world_at(source: SourceState, destination: DestinationState | None, tokens: int = 0) -> World:
    """A migration that has come so far without a fault, its tokens still on their way to the front end."""
    world = World(tokens)
    while (source, destination) != (
        world.source.machine.state,
        world.destination and world.destination.machine.state,
    ):
        next(iter(world.due_for_migration().values()))()
    return world


class Adversary(RuleBasedStateMachine):
    """Each run has a few kinds of faults, else none would get as far as the interesting states."""

    @initialize(
        phase=st.sampled_from(PHASES),
        tokens=st.integers(0, 3),
        kinds=st.sets(st.sampled_from(Fault), min_size=1, max_size=6),
    )
    def start(
        self, phase: tuple[SourceState, DestinationState | None], tokens: int, kinds: set[Fault]
    ) -> None:
        self.world = world_at(*phase, tokens)
        self.kinds = kinds

    @precondition(lambda self: self.world.due())
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        acts = self.world.due()
        acts[data.draw(st.sampled_from(list(acts)))]()

    @precondition(lambda self: self.world.faults(self.kinds))
    @rule(data=st.data())
    def go_wrong(self, data: st.DataObject) -> None:
        acts = self.world.faults(self.kinds)
        acts[data.draw(st.sampled_from(list(acts)))]()

    @rule(name=st.sampled_from([SOURCE, DESTINATION, THIRD, FRESH]))
    def decode(self, name: str) -> None:
        self.world.decode(name)

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


Adversary.TestCase.settings = settings(max_examples=settings.default.max_examples * 5, stateful_step_count=30)
TestAdversary = Adversary.TestCase
