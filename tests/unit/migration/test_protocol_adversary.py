"""Both state tables against the worst network, engines, timers and front end that the contracts allow.

Messages are lost, doubled and delayed as hypothesis likes, timers fire whenever they are armed, either side
may die, the client may leave, the source may preempt, the destination may refuse, fail or move the request
on at once. See `protocol_world` for the model and for what must hold.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.migration.protocol_world import (
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
        world.source.state_machine.state,
        world.destination and world.destination.state_machine.state,
    ):
        next(iter(world.due_for_migration().values()))()
    return world


def lose_everything(world: World) -> None:
    world.to_destination.clear()
    world.to_source.clear()


def go_on_with_migration(world: World) -> None:
    while acts := world.due_for_migration():
        next(iter(acts.values()))()


class TestScenarios:
    """What the adversary has found, or should have; each of them went wrong once."""

    def test_taken_back_while_the_destination_has_moved_it_on(self) -> None:
        """Source and third instance decode under the same epoch: the first to be heard is the owner."""
        for first, second in ((SOURCE, THIRD), (THIRD, SOURCE)):
            world = world_at(SS.SUSPENDED, DS.COMMITTED)
            world.move_on()
            while world.source.state_machine.state is not SS.RETREATING:
                lose_everything(world)
                world.source_timer()
            go_on_with_migration(world)
            source, third = world.places[SOURCE].copy, world.places[THIRD].copy
            assert source is not None
            assert third is not None
            assert source.epoch == third.epoch
            for name in (first, second):
                world.decode(name)
                world.tokens_arrive(name)
            assert world.ledger.owner == first
            assert (list(world.places[first].aborts), list(world.places[second].aborts)) == (
                [],
                [source.epoch + 1],
            )
            world.finish()

    def test_questions_are_answered_and_the_final_state_is_always_lost(self) -> None:
        """Each answer asks for the final state, so the source never waits long enough to ask again."""
        world = world_at(SS.SUSPENDED, DS.WAITING)
        for _ in range(20):
            if world.source.state_machine.state is SS.SUSPENDED:
                world.to_destination.clear()  # the final state
                world.source_timer()
                if world.source.state_machine.state is SS.ASKING:
                    world.deliver_to_destination()
                    world.deliver_to_source()
        assert world.source.state_machine.state is SS.RETREATING
        world.finish()

    def test_withdrawn_while_the_destination_still_reserves(self) -> None:
        """A drop sent at once would overtake a reservation that waits for a grammar."""
        world = world_at(SS.OFFERED, DS.RESERVING)
        world.source_timer()
        world.deliver_to_destination()
        assert world.destination is not None
        assert world.destination.engine_call == "reserve"
        world.finish()
        assert world.ledger.num_moves == 0

    def test_aborted_between_the_engines_answer_and_its_arrival(self) -> None:
        """The final state of a request that has ended must not bring it back to life elsewhere."""
        world = world_at(SS.ADVANCING, DS.WAITING)
        world.engine_suspends()
        world.client_leaves()
        world.abort_arrives(SOURCE)
        world.settle()
        assert not world.source.final_sent
        world.finish()

    def test_destination_dies_between_commit_and_first_token(self) -> None:
        """The ledger still names the source, which has released: only its report tells who was lost."""
        world = world_at(SS.COMMITTED, DS.COMMITTED, tokens=3)
        while world.places[SOURCE].said:
            world.tokens_arrive(SOURCE)
        world.report_arrives(SOURCE)
        world.die(DESTINATION)
        world.finish()
        assert world.ledger.owner == FRESH

    def test_the_report_of_a_commit_comes_after_the_death(self) -> None:
        world = world_at(SS.COMMITTED, DS.COMMITTED, tokens=3)
        while world.places[SOURCE].said:
            world.tokens_arrive(SOURCE)
        world.die(DESTINATION)
        world.see_dead("front end", DESTINATION)
        world.finish()
        assert world.ledger.owner == FRESH

    def test_tokens_of_a_destination_that_is_known_to_be_dead(self) -> None:
        """They made it the owner, after its death had been dealt with and before the source's report came."""
        world = world_at(SS.COMMITTED, DS.COMMITTED, tokens=3)
        while world.places[SOURCE].said:
            world.tokens_arrive(SOURCE)
        world.decode(DESTINATION)
        world.die(DESTINATION)
        world.see_dead("front end", DESTINATION)
        world.tokens_arrive(DESTINATION)
        world.finish()
        assert world.ledger.owner == FRESH

    def test_last_tokens_of_the_source_are_lost_with_it(self) -> None:
        """The destination has been heard; the gap before its first token would never close."""
        world = world_at(SS.COMMITTED, DS.COMMITTED, tokens=3)
        world.decode(DESTINATION)
        world.tokens_arrive(DESTINATION)
        world.die(SOURCE)
        world.finish()
        assert world.ledger.owner == FRESH


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
