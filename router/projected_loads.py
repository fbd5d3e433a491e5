"""Load reports, corrected by the decisions that they do not show yet.

Every process that decides keeps one `ProjectedLoads`: an API server adds its dispatches and hand-offs, the
scheduler its moves. Without them a burst between two reports would herd onto one instance, and each round of
the scheduler would repeat the moves of the last one. Nothing in it must survive: after one round of reports
a new one is right again.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from msgspec.structs import replace

from router.load import InstanceLoad
from router.prefix_index import PrefixIndex

#: A move that its source has not confirmed for this long is lost, in seconds: the source of a move among
#: many instances reports once a second.
LOST_AFTER_S = 2.0

#: A request that its instance has not confirmed for this long is lost, in seconds. The instance confirms it
#: after a step, which may take long.
LOST_DISPATCH_AFTER_S = 30.0


class PendingDispatch(NamedTuple):
    """A request sent to an instance. `number` is the instance's `requests_added` once it has it."""

    number: int
    sent_at: float
    tokens: int
    blocks: int


class PendingMove(NamedTuple):
    """A move ordered from an instance. `number` is its `moves_decided` once it has carried out the order."""

    number: int
    decided_at: float
    destination: str


class ProjectedLoads:
    """The latest report of each instance, and the decisions since.

    Args:
        clock: Seconds, for the age of reports and moves. None: neither ages.
        max_report_age_s: Reports older than this are not `fresh`.

    Attributes:
        prefixes: What the instances have in their prefix caches.
        nodes: Machines of the instances, as far as they are known.
    """

    def __init__(self, clock: Callable[[], float] | None = None, max_report_age_s: float = math.inf) -> None:
        self._clock = clock or (lambda: 0.0)
        self._max_report_age_s = max_report_age_s
        self.prefixes = PrefixIndex(self._clock)
        self.nodes: dict[str, str] = {}
        self._reports: dict[str, InstanceLoad] = {}
        self._reported_at: dict[str, float] = {}
        self._dispatches: dict[str, deque[PendingDispatch]] = {}
        self._moves: dict[str, deque[PendingMove]] = {}  # by source
        self._arrivals: dict[str, dict[str, int]] = {}  # blocks by request or move on its way to an instance
        self._projected: dict[str, InstanceLoad] = {}  # of all instances, in the order of their first reports
        self._outdated: set[str] = set()  # instances whose projected load has to be made again
        self._oldest_at = math.inf  # the oldest report is not older

    # ---- reports

    def __iter__(self) -> Iterator[InstanceLoad]:
        return iter(self._reports.values())

    def __getitem__(self, instance_id: str) -> InstanceLoad:
        return self._reports[instance_id]

    def get(self, instance_id: str) -> InstanceLoad | None:
        return self._reports.get(instance_id)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._reports

    def report(self, load: InstanceLoad) -> None:
        """Takes a report; the decisions that it shows are no longer pending."""
        name = load.instance_id
        now = self._clock()
        self._reports[name] = load
        self._reported_at[name] = now
        self._oldest_at = min(self._oldest_at, now - load.step_s)
        self._projected.setdefault(name, load)
        self._outdated.add(name)
        dispatches = self._dispatches.get(name)
        oldest = now - LOST_DISPATCH_AFTER_S
        while dispatches and (dispatches[0].number <= load.requests_added or dispatches[0].sent_at < oldest):
            dispatches.popleft()
        moves = self._moves.get(name)
        while moves and moves[0].number <= load.moves_decided:
            self._end_move(name, moves.popleft())

    def forget(self, instance_id: str) -> None:
        """Forgets an instance's reports, and what has been decided for it since, until its next report.

        Unknown instances are ignored.
        """
        for move in self._moves.pop(instance_id, ()):
            self._end_move(instance_id, move)
        self._outdated.discard(instance_id)
        for known in (self._reports, self._reported_at, self._dispatches, self._projected):
            known.pop(instance_id, None)

    def remove(self, instance_id: str) -> None:
        """Forgets an instance and everything on its way there. Unknown instances are ignored."""
        self.forget(instance_id)
        self.prefixes.remove(instance_id)
        self.nodes.pop(instance_id, None)
        self._arrivals.pop(instance_id, None)

    def are_apart(self, one: str, other: str) -> bool:
        """Whether two instances are known to run on different machines."""
        return self.apart_from(one, [other]) == [True]

    def apart_from(self, instance_id: str, others: Iterable[str]) -> list[bool]:
        """Whether each of other instances is known to run on another machine than this one."""
        here = self.nodes.get(instance_id)
        return [here is not None and self.nodes.get(other, here) != here for other in others]

    # ---- decisions

    def add_dispatch(self, instance_id: str, tokens: int, blocks: int) -> None:
        """A new request with a prompt of this size has been sent to an instance."""
        pending = self._dispatches.setdefault(instance_id, deque())
        # The instance counts the requests of all API servers, so the count starts from its own report.
        number = (pending[-1].number if pending else self._reports[instance_id].requests_added) + 1
        pending.append(PendingDispatch(number, self._clock(), tokens, blocks))
        self._outdated.add(instance_id)

    def add_move(self, source: str, destination: str, blocks: int) -> None:
        """One request, of an assumed size, has been ordered to move. Ends with the source's confirmation,
        as the migration is in both reports from then on, or after `LOST_AFTER_S`."""
        pending = self._moves.setdefault(source, deque())
        number = (pending[-1].number if pending else self._reports[source].moves_decided) + 1
        pending.append(PendingMove(number, self._clock(), destination))
        self._outdated.add(source)
        self.expect(destination, f"{source}:{number}", blocks)

    def expect(self, instance_id: str, request_id: str, blocks: int) -> None:
        """A request is on its way to an instance, and counts there until `settled`."""
        self._arrivals.setdefault(instance_id, {})[request_id] = blocks
        self._outdated.add(instance_id)

    def settled(self, instance_id: str, request_id: str) -> None:
        """A request has arrived, and is in the reports, or will not arrive."""
        if self._arrivals.get(instance_id, {}).pop(request_id, None) is not None:
            self._outdated.add(instance_id)

    def _end_move(self, source: str, move: PendingMove) -> None:
        self._outdated.add(source)
        self.settled(move.destination, f"{source}:{move.number}")

    # ---- projections

    def all(self) -> list[InstanceLoad]:
        """Every instance's projected load."""
        self._expire_moves()
        return self._up_to_date()

    def fresh(self) -> list[InstanceLoad]:
        """The projected loads of the instances whose last report is not too old.

        What it says of the engine was read before the step in progress.
        """
        oldest = self._clock() - self._max_report_age_s
        loads, at = self._up_to_date(), self._reported_at
        if self._oldest_at < oldest:
            self._oldest_at = min(
                [at[name] - load.step_s for name, load in self._reports.items()], default=math.inf
            )
        if self._oldest_at >= oldest:
            return loads
        return [load for load in loads if at[load.instance_id] - load.step_s >= oldest]

    def silent(self) -> dict[str, float]:
        """Seconds since the last report, by instance, where that report is too old."""
        now = self._clock()
        return {name: now - at for name, at in self._reported_at.items() if at < now - self._max_report_age_s}

    def projected(self, instance_id: str) -> InstanceLoad:
        """The latest report of an instance with every pending decision counted in."""
        if instance_id in self._outdated:
            self._outdated.discard(instance_id)
            self._projected[instance_id] = self._project(self._reports[instance_id])
        return self._projected[instance_id]

    def free_blocks(self, instance_id: str) -> int:
        """Free blocks of an instance, less what is on its way there."""
        load = self.projected(instance_id)
        return load.free_blocks - load.expected_blocks

    def _up_to_date(self) -> list[InstanceLoad]:
        for name in self._outdated & self._reports.keys():
            self._projected[name] = self._project(self._reports[name])
        self._outdated.clear()
        return list(self._projected.values())

    def _project(self, load: InstanceLoad) -> InstanceLoad:
        name = load.instance_id
        if dispatches := self._dispatches.get(name):
            load = replace(
                load,
                requests_added=dispatches[-1].number,
                waiting=load.waiting + len(dispatches),
                waiting_tokens=load.waiting_tokens + sum(pending.tokens for pending in dispatches),
                waiting_blocks=load.waiting_blocks + sum(pending.blocks for pending in dispatches),
            )
        if moves := self._moves.get(name):
            load = replace(load, migrating_out=load.migrating_out + len(moves))
        if arrivals := self._arrivals.get(name):
            load = replace(load, migrating_in=load.migrating_in + len(arrivals))
            load = load.with_arrivals(sum(arrivals.values()), len(arrivals))
        return load

    def _expire_moves(self) -> None:
        oldest = self._clock() - LOST_AFTER_S
        for source, moves in self._moves.items():
            while moves and moves[0].decided_at < oldest:
                self._end_move(source, moves.popleft())


def after_departures(load: InstanceLoad) -> InstanceLoad:
    """The load once its outgoing migrations have ended.

    A report does not say which requests are leaving: they count as requests of average size.
    """
    leaving = min(load.migrating_out, load.running)
    return load.with_departures(leaving * load.mean_blocks, leaving) if leaving else load
