"""Two `Machine`s and a model of all that surrounds them: no event loop, no time, every choice from outside.

Modelled are the network (messages in order per direction and sender), both engines and drivers, as far as
the request's whereabouts and the blocks go, and the front end: the real `TokenLedger`, with what the
request router does around it. `due` lists what happens if all goes well, `faults` what else may happen.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum, auto

from migration.destination_table import (
    DESTINATION_TABLE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
)
from migration.source_table import SOURCE_TABLE, SourceAction, SourceEvent, SourceState
from migration.state_machine import StateMachine
from migration.token_span import crc_of
from pd_serve.errors import ProtocolError
from pd_serve.frontend.token_ledger import TokenLedger

SS, SE, SA = SourceState, SourceEvent, SourceAction
DS, DE, DA = DestinationState, DestinationEvent, DestinationAction

LENGTH = 40  # tokens of the request; token i is the number i
QUESTIONS = 2
SOURCE, DESTINATION, THIRD, FRESH = "source", "destination", "third", "fresh"

Final = tuple[int, int]  # (epoch, tokens)
Acts = dict[str, Callable[[], None]]


class Fault(StrEnum):
    LOST_TO_DESTINATION = auto()
    LOST_TO_SOURCE = auto()
    DOUBLED = auto()
    SOURCE_TIMER = auto()
    DESTINATION_TIMER = auto()
    ENGINE = auto()  # refuses, fails to copy or to commit
    CANCEL = auto()
    PREEMPT = auto()
    CLIENT_LEAVES = auto()
    SOURCE_DIES = auto()
    DESTINATION_DIES = auto()
    MOVED_ON = auto()  # the destination gives the request to a third instance


@dataclass
class Output:
    """What the ledger reads of vLLM's `EngineCoreOutput`."""

    new_token_ids: list[int]
    finish_reason: str | None = None
    new_logprobs: None = None


@dataclass
class Copy:
    """The request in one engine."""

    epoch: int
    tokens: int
    running: bool = True


@dataclass
class Place:
    """An instance as the front end sees it: its engine's copy, and the ways to and from it."""

    copy: Copy | None = None
    alive: bool = True
    said: deque[tuple[int, int, bool]] = field(default_factory=deque)  # (epoch, index, last) on the way
    reports: deque[str] = field(default_factory=deque)  # "committed to ..." on the way
    aborts: deque[int | None] = field(default_factory=deque)  # on the way there; only below that epoch


class Source:
    """The source's machine with what its driver and its coordinator keep."""

    def __init__(self) -> None:
        self.state_machine: StateMachine[SS, SE, SA] = StateMachine(SOURCE_TABLE, SS.OFFERED)
        self.open = True
        self.preempted = False
        self.stage_asked = False
        self.answer: SE | None = None  # of the engine to ADVANCE, on its way to the driver
        self.final: Final | None = None
        self.final_sent = False
        self.resume_epoch: int | None = None
        self.release_asked = False
        self.questions = 0

    @property
    def committed(self) -> bool:
        return self.state_machine.state is SS.COMMITTED


class Destination:
    """The destination's machine with what its driver and its engine keep."""

    def __init__(self) -> None:
        self.state_machine: StateMachine[DS, DE, DA] = StateMachine(DESTINATION_TABLE, DS.RESERVING)
        self.reserved = False
        self.engine_call: str | None = "reserve"
        self.copying = False
        self.copy_is_stopped = False
        self.final: Final | None = None


class World:
    def __init__(self, tokens: int = 0) -> None:
        self.places = {name: Place() for name in (SOURCE, DESTINATION, THIRD, FRESH)}
        self.source = Source()
        self.destination: Destination | None = None
        self.to_destination: deque[tuple[str, Final | None]] = deque([("offer", None)])
        self.to_source: deque[str] = deque()
        self.ledger = TokenLedger(SOURCE)
        self.routed = True
        self.client_left = False
        self.committed_to = ""
        self.seen_dead: set[tuple[str, str]] = set()  # (who has seen it, who is dead)
        self.places[SOURCE].copy = Copy(0, 0)
        for _ in range(tokens):
            self.decode(SOURCE)

    # ---- what happens if all goes well

    def due(self) -> Acts:
        return self.due_for_migration() | self.due_at_front_end()

    def due_for_migration(self) -> Acts:
        acts: Acts = {}
        if self.to_destination:
            acts["deliver to destination"] = self.deliver_to_destination
        if self.to_source:
            acts["deliver to source"] = self.deliver_to_source
        if self.places[SOURCE].alive:
            source = self.source
            if source.stage_asked and source.answer is None:
                acts["engine suspends"] = self.engine_suspends
            if source.answer is not None:
                acts["the engine's answer arrives"] = self.answer_arrives
            if source.resume_epoch is not None:
                acts["engine resumes"] = self.engine_resumes
            if source.release_asked:
                acts["engine releases"] = self.engine_releases
        if self.destination is not None:
            if self.destination.engine_call is not None:
                acts[f"engine does {self.destination.engine_call}"] = self.destination_engine_answers
            if self.destination.copying:
                acts["copy ends"] = self.copy_ends
        return acts

    def due_at_front_end(self) -> Acts:
        acts: Acts = {}
        for name, place in self.places.items():
            if place.said:
                acts[f"tokens of {name} arrive"] = lambda name=name: self.tokens_arrive(name)
            if place.reports:
                acts[f"report of {name} arrives"] = lambda name=name: self.report_arrives(name)
            if place.aborts:
                acts[f"abort arrives at {name}"] = lambda name=name: self.abort_arrives(name)
            if not place.alive:
                for who in {"front end", SOURCE, DESTINATION} - {name} - {w for w, d in self.seen_dead}:
                    acts[f"{who} sees that {name} is dead"] = lambda who=who, name=name: self.see_dead(
                        who, name
                    )
        return acts

    def faults(self, kinds: Collection[Fault]) -> Acts:
        return {str(kind): act for kind, act in self._possible_faults().items() if kind in kinds and act}

    def _possible_faults(self) -> dict[Fault, Callable[[], None] | None]:
        source, destination = self.source, self.destination
        open_source = self.places[SOURCE].alive and source.open
        engine_may_fail = destination is not None and (destination.copying or destination.engine_call)
        return {
            Fault.LOST_TO_DESTINATION: self.to_destination.popleft if self.to_destination else None,
            Fault.LOST_TO_SOURCE: self.to_source.popleft if self.to_source else None,
            Fault.DOUBLED: self.double_messages,
            Fault.SOURCE_TIMER: self.source_timer if open_source else None,
            Fault.DESTINATION_TIMER: self.destination_timer if destination is not None else None,
            Fault.ENGINE: self.engine_fails if engine_may_fail else None,
            Fault.CANCEL: (lambda: self._feed_source(SE.CANCELLED)) if open_source else None,
            Fault.PREEMPT: self.preempt if open_source else None,
            Fault.CLIENT_LEAVES: self.client_leaves if self.routed else None,
            Fault.SOURCE_DIES: lambda: self.die(SOURCE),
            Fault.DESTINATION_DIES: lambda: self.die(DESTINATION),
            Fault.MOVED_ON: self.move_on if self.places[DESTINATION].copy is not None else None,
        }

    # ---- the source's driver

    def _feed_source(self, event: SE) -> None:
        source = self.source
        for action in source.state_machine.handle(event):
            match action:
                case SA.ADVANCE:
                    assert not source.stage_asked, "one next_stage at a time"
                    source.stage_asked = True
                case SA.SEND_STAGE:
                    self.to_destination.append(("stage", None))
                case SA.SEND_FINAL:
                    source.final_sent = True
                    self.to_destination.append(("final", source.final))
                case SA.SEND_KEEP_ALIVE:
                    self.to_destination.append(("keep alive", None))
                case SA.SEND_QUERY:
                    source.questions += 1
                    self.to_destination.append(("query", None))
                case SA.SEND_WITHDRAW:
                    self.to_destination.append(("withdraw", None))
                case SA.SEND_CONFIRMED:
                    self.to_destination.append(("confirmed", None))
                case SA.RESUME:
                    source.resume_epoch = 0 if source.final is None else source.final[0] + 2
                case SA.RELEASE:
                    source.release_asked = True
                case SA.CLOSE:
                    source.open = False
                    if source.committed:
                        self.places[SOURCE].reports.append(DESTINATION)

    def _request_ends_at_source(self) -> None:
        self.places[SOURCE].copy = None
        if self.source.open:
            self._feed_source(SE.GONE)

    def deliver_to_source(self) -> None:
        message = self.to_source.popleft()
        if not self.places[SOURCE].alive:
            return
        if self.source.open:
            events = {
                "pull": SE.PULLED,
                "refused": SE.REFUSED,
                "committed": SE.ACKNOWLEDGED,
                "dropped": SE.DROPPED,
            }
            with contextlib.suppress(ProtocolError):  # the coordinator logs it
                self._feed_source(events[message])
        elif message in ("pull", "committed") and not self.source.committed:
            self.to_destination.append(("withdraw", None))

    def source_timer(self) -> None:
        state = self.source.state_machine.state
        if state in (SS.SUSPENDED, SS.ASKING) and self.source.questions >= QUESTIONS:
            self._feed_source(SE.GAVE_UP)
        elif state not in (SS.RETREATING, SS.RELEASING):
            self._feed_source(SE.TIMED_OUT)

    # ---- the source's engine

    def engine_suspends(self) -> None:
        copy = self.places[SOURCE].copy
        if copy is None or self.source.preempted:
            self.source.answer = SE.GONE
        else:
            copy.running = False
            self.source.answer = SE.SUSPENDED

    def answer_arrives(self) -> None:
        """Scenario: anything may have happened since the engine gave its answer."""
        source, copy = self.source, self.places[SOURCE].copy
        answer, source.answer, source.stage_asked = source.answer, None, False
        assert answer is not None
        if answer is SE.GONE and source.state_machine.state is SS.RETREATING:
            return
        if answer is SE.SUSPENDED:
            source.final = (copy.epoch, copy.tokens) if copy else (0, 0)
        self._feed_source(answer)

    def engine_resumes(self) -> None:
        """Also ends a pending `next_stage`, as the engine's contract says."""
        source, copy = self.source, self.places[SOURCE].copy
        assert source.resume_epoch is not None
        if copy is not None:
            copy.running, copy.epoch = True, max(copy.epoch, source.resume_epoch)
        source.resume_epoch = None
        if source.stage_asked and source.answer is None:
            source.answer = SE.GONE
        self._feed_source(SE.ENGINE_DONE)

    def engine_releases(self) -> None:
        copy = self.places[SOURCE].copy
        assert copy is None or not copy.running, "released while decoding"
        self.source.release_asked = False
        self.places[SOURCE].copy = None
        self._feed_source(SE.ENGINE_DONE)

    def preempt(self) -> None:
        copy = self.places[SOURCE].copy
        self.source.preempted |= copy is not None and copy.running

    # ---- the destination's driver

    def _feed_destination(self, event: DE) -> None:
        destination = self.destination
        assert destination is not None
        for action in destination.state_machine.handle(event):
            match action:
                case DA.SEND_PULL:
                    self.to_source.append("pull")
                case DA.SEND_REFUSED:
                    self.to_source.append("refused")
                case DA.SEND_COMMITTED:
                    self.to_source.append("committed")
                case DA.SEND_DROPPED:
                    self.to_source.append("dropped")
                case DA.COPY:
                    assert destination.reserved
                    assert not destination.copying
                    destination.copying, destination.copy_is_stopped = True, False
                case DA.STOP_COPY:
                    destination.copy_is_stopped = True
                case DA.COMMIT:
                    self._ask_destination_engine("commit")
                case DA.DROP:
                    self._ask_destination_engine("drop")
                case DA.PUBLISH:
                    pass
                case DA.CLOSE:
                    self.destination = None

    def _ask_destination_engine(self, call: str) -> None:
        assert self.destination is not None
        assert self.destination.engine_call is None, "one engine call at a time"
        assert not self.destination.copying, "nothing is freed or entered under a copy"
        self.destination.engine_call = call

    def deliver_to_destination(self) -> None:
        message, final = self.to_destination.popleft()
        destination = self.destination
        events = {
            "stage": DE.STAGE,
            "final": DE.FINAL,
            "keep alive": DE.KEEP_ALIVE,
            "withdraw": DE.WITHDRAWN,
            "query": DE.QUERIED,
            "confirmed": DE.CONFIRMED,
        }
        if not self.places[DESTINATION].alive:
            return
        if destination is None and message == "offer":
            self.destination = Destination()
        elif destination is None and message not in ("withdraw", "confirmed"):
            self.to_source.append("dropped")
        elif destination is not None and message != "offer":
            if message == "final" and destination.state_machine.state is DS.WAITING:
                destination.final = final
            with contextlib.suppress(ProtocolError):
                self._feed_destination(events[message])

    def destination_timer(self) -> None:
        assert self.destination is not None
        if self.destination.state_machine.state in (DS.WAITING, DS.COPYING, DS.TAIL, DS.COMMITTED):
            self._feed_destination(DE.TIMED_OUT)

    # ---- the destination's engine and transport

    def destination_engine_answers(self, works: bool = True) -> None:
        destination, place = self.destination, self.places[DESTINATION]
        assert destination is not None
        call, destination.engine_call = destination.engine_call, None
        if call == "reserve":
            destination.reserved = works
            self._feed_destination(DE.RESERVED if works else DE.REFUSED)
        elif call == "commit":
            if works:
                assert destination.final is not None
                epoch, tokens = destination.final
                destination.reserved = False
                place.copy = Copy(epoch + 1, tokens)
            self._feed_destination(DE.ENTERED if works else DE.COMMIT_FAILED)
        else:
            destination.reserved, place.copy = False, None
            self._feed_destination(DE.ENGINE_DONE)

    def copy_ends(self, works: bool = True) -> None:
        assert self.destination is not None
        self.destination.copying = False
        works = works and not self.destination.copy_is_stopped and self.places[SOURCE].alive
        self._feed_destination(DE.COPIED if works else DE.COPY_FAILED)

    def engine_fails(self) -> None:
        assert self.destination is not None
        if self.destination.copying:
            self.copy_ends(works=False)
        else:
            self.destination_engine_answers(works=self.destination.engine_call == "drop")

    def move_on(self) -> None:
        """Scenario: the third instance gets the epoch that the source would take the request back with."""
        place, third = self.places[DESTINATION], self.places[THIRD]
        assert place.copy is not None
        if third.copy is None and not third.said:
            third.copy = Copy(place.copy.epoch + 1, place.copy.tokens)
            place.copy = None
            place.reports.append(THIRD)

    # ---- the network

    def double_messages(self) -> None:
        """The next message either way arrives once more, after all others."""
        if self.to_destination:
            self.to_destination.append(self.to_destination[0])
        if self.to_source:
            self.to_source.append(self.to_source[0])

    # ---- tokens and the front end

    def decode(self, name: str) -> None:
        place = self.places[name]
        copy = place.copy
        if copy is None or not copy.running:
            return
        last = copy.tokens + 1 == LENGTH
        place.said.append((copy.epoch, copy.tokens, last))
        copy.tokens += 1
        if last and name == SOURCE:
            self._request_ends_at_source()
        elif last:
            place.copy = None

    def tokens_arrive(self, name: str) -> None:
        place = self.places[name]
        epoch, index, last = place.said.popleft()
        if ("front end", name) in self.seen_dead:
            return
        if self.routed:
            output = Output([index], "length" if last else None)
            span = (epoch, index, crc_of(range(index)))
            stale = self.ledger.accept(name, span, output, now=0.0).is_stale
            if self.ledger.owner == self.committed_to:
                self.committed_to = ""
            self.routed = not self.ledger.finished
            if stale:
                place.aborts.append(epoch + 1)
        elif not last:
            place.aborts.append(None)

    def report_arrives(self, name: str) -> None:
        destination = self.places[name].reports.popleft()
        if self.routed and name in (self.ledger.owner, self.committed_to):
            if ("front end", destination) in self.seen_dead:
                self._recompute()
            else:
                self.committed_to = destination

    def abort_arrives(self, name: str) -> None:
        place = self.places[name]
        below_epoch = place.aborts.popleft()
        if place.copy is None:
            if name == SOURCE and self.source.committed:
                self.places[DESTINATION].aborts.append(below_epoch)
        elif below_epoch is not None and place.copy.epoch >= below_epoch:
            pass  # it is about an older copy
        elif name == SOURCE:
            self._request_ends_at_source()
        else:
            place.copy = None

    def client_leaves(self) -> None:
        self.routed, self.client_left = False, True
        self.places[self.ledger.owner].aborts.append(None)

    def _recompute(self) -> None:
        self.committed_to = ""
        epoch = self.ledger.take_over(FRESH)
        self.places[FRESH].copy = Copy(epoch, len(self.ledger.token_ids))

    # ---- death

    def die(self, name: str) -> None:
        """One side at most. The last that it has said dies with it."""
        if all(place.alive for place in self.places.values()):
            place = self.places[name]
            place.alive, place.copy = False, None
            place.reports.clear()
            while len(place.said) > 1:
                place.said.pop()
            if name == DESTINATION:
                self.destination = None

    def see_dead(self, who: str, name: str) -> None:
        self.seen_dead.add((who, name))
        if who == "front end":
            if self.routed and (name in (self.ledger.owner, self.committed_to) or self.ledger.has_gap):
                self._recompute()
        elif who == SOURCE and self.source.open:
            self._feed_source(SE.PEER_LOST)
        elif who == DESTINATION and self.destination is not None:
            self._feed_destination(DE.PEER_LOST)

    # ---- what must always hold

    def check(self) -> None:
        tokens = self.ledger.token_ids
        assert tokens == list(range(len(tokens))), "the client's tokens are the right ones, in order"
        source, destination = self.places[SOURCE].copy, self.places[DESTINATION].copy
        if source is not None and source.running:
            assert destination is None or source.epoch != destination.epoch, "two owners of one epoch"
            if self.source.final_sent:
                assert self.source.final is not None
                assert source.epoch == self.source.final[0] + 2, "taken back, it outranks the destination"
        if source is not None and not source.running:
            assert self.source.open or self.source.resume_epoch is not None, "suspended, and nobody minds it"

    # ---- the end: the network heals, all timers fire

    def settle(self) -> None:
        for _ in range(1000):
            for act in self.due().values():
                act()
                break
            else:
                if self.places[SOURCE].alive and self.source.open:
                    self.source_timer()
                elif self.destination is not None:
                    self.destination_timer()
                else:
                    return
        raise AssertionError(f"no rest: {self.source.state_machine.history_text()} / {self.destination}")

    def copies(self) -> dict[str, Copy]:
        return {name: place.copy for name, place in self.places.items() if place.copy is not None}

    def finish(self) -> None:
        """Nothing is held by either side, and the request lives in one place until it is finished or left."""
        self.settle()
        self.check()
        assert all(copy.running for copy in self.copies().values()), "suspended for ever"
        assert self.copies() or not self.routed, "nobody decodes the request"
        while len(self.copies()) > 1:  # stale owners are told so when they say something new
            for name in self.places:
                self.decode(name)
            self.settle()
        assert self.copies() or not self.routed, "the request lives nowhere"
        for _ in range(LENGTH):
            for name in self.places:
                self.decode(name)
        self.settle()
        self.check()
        assert not self.copies()
        assert self.client_left or self.ledger.token_ids == list(range(LENGTH))
