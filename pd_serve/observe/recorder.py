"""The one observer of requests: events in, timelines out. No I/O, and no clock of its own.

The request router says what happens; whoever wants to know (metrics, log, tracer, a page) is an `Observer`
and hears of it here, so that all of them tell the same story.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from migration.record import MigrationRecord
from pd_serve.observe.timeline import ObservedMigration, Stage, Stay, Timeline
from router.request import NewRequest

#: Requests that have ended and can still be asked for.
KEEP_ENDED = 1000


class Observer:
    """Hears of every request. What it does not override it does not want to know."""

    def issued(self, request: Timeline) -> None:
        """It has come in."""

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        """It has been sent to an instance."""

    def first_token(self, request: Timeline) -> None:
        """Its client gets its first token."""

    def stage(self, request: Timeline, stage: Stage) -> None:
        """A part of its life is over."""

    def moved(self, request: Timeline, stay: Stay) -> None:
        """Its tokens come from another instance now."""

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        """A migration of it has ended, either way."""

    def migration_ended(self, record: MigrationRecord) -> None:
        """A migration has ended, of any API server's request."""

    def downtime(self, request: Timeline, migration: ObservedMigration) -> None:
        """The gap that a migration has made is known."""

    def lost(self, request: Timeline, instance: str) -> None:
        """Its instance has died; it is computed again elsewhere."""

    def ended(self, request: Timeline) -> None:
        """It is over."""

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        """How many tokens came after such gaps, in seconds; called once per message of an engine."""


class RequestRecorder:
    """Timelines of the requests of one API server: all that run, and those that ended last.

    Every call but `find` is about a request by its id, and ignored if that is not known (any more).

    Args:
        observers: Told of everything, in this order.
        unix_offset_s: From the clock of all times to Unix time.
        keep_ended: How many ended requests to keep.
    """

    def __init__(
        self,
        observers: Iterable[Observer] = (),
        *,
        unix_offset_s: float = 0.0,
        keep_ended: int = KEEP_ENDED,
    ) -> None:
        self.observers: Sequence[Observer] = tuple(observers)
        self._unix_offset_s = unix_offset_s
        self._keep_ended = keep_ended
        self._running: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()

    # ---- what happens

    def issued(
        self,
        request_id: str,
        now: float,
        new: NewRequest,
        *,
        name: str = "",
        trace_headers: Mapping[str, str] | None = None,
    ) -> None:
        request = Timeline(
            request_id,
            name or request_id,
            now,
            new.prompt_tokens,
            new.priority,
            trace_headers,
            waits_since=now,
        )
        self._running[request_id] = request
        self._tell(lambda observer: observer.issued(request))

    def dispatched(self, request_id: str, instance: str, role: str, now: float) -> None:
        if (request := self._running.get(request_id)) is None:
            return
        self._stage(request, "dispatch", instance, request.waits_since, now)
        stay = Stay(instance, role, now, recompute=request.recomputes > 0)
        request.stays.append(stay)
        self._tell(lambda observer: observer.dispatched(request, stay))

    def spoke(
        self,
        request_id: str,
        instance: str,
        role: str,
        now: float,
        *,
        gap_s: float = 0.0,
        prefill_s: float | None = None,
    ) -> None:
        """The first token of an owner.

        Args:
            gap_s: Since the last token of the former owner.
            prefill_s: How long ago its prefill there began, if the engine says so.
        """
        request = self._running.get(request_id)
        if request is None or not request.stays:
            return
        stay = request.stays[-1]
        if stay.spoke_at is None:
            self._prefilled(request, stay, now, prefill_s if stay.instance == instance else None)
        if stay.instance != instance:
            self._leaves(request, stay, now)
            stay = Stay(instance, role, now, spoke_at=now, gap_s=gap_s)
            request.stays.append(stay)
            self._tell(lambda observer: observer.moved(request, stay))
            arrived = [
                m for m in request.migrations if m.record.committed and m.record.destination == instance
            ]
            if arrived and arrived[-1].downtime_s is None:
                self._downtime(request, stay, arrived[-1])

    def migrated(self, record: MigrationRecord, now: float) -> None:
        """An instance has told how a migration ended; that may be later than its tokens do."""
        self._tell(lambda observer: observer.migration_ended(record))
        request = self._running.get(record.request_id) or self._ended.get(record.request_id)
        if request is None:
            return
        migration = ObservedMigration(record, now)
        request.migrations.append(migration)
        self._tell(lambda observer: observer.migrated(request, migration))
        stay = request.stays[-1] if request.stays else None
        if record.committed and stay is not None and stay.instance == record.destination:
            self._downtime(request, stay, migration)

    def lost(self, request_id: str, instance: str, now: float) -> None:
        if (request := self._running.get(request_id)) is None:
            return
        if request.stays:
            self._leaves(request, request.stays[-1], now)
        request.recomputes += 1
        request.waits_since = now
        self._tell(lambda observer: observer.lost(request, instance))

    def ended(
        self, request_id: str, outcome: str, now: float, *, tokens: int = 0, longest_gap_s: float = 0.0
    ) -> None:
        if (request := self._running.pop(request_id, None)) is None:
            return
        if request.stays and request.stays[-1].end is None:
            self._leaves(request, request.stays[-1], now, ends=True)
        request.ended_at, request.outcome = now, outcome
        request.output_tokens, request.longest_gap_s = tokens, longest_gap_s
        self._ended[request_id] = request
        while len(self._ended) > self._keep_ended:
            self._ended.popitem(last=False)
        self._tell(lambda observer: observer.ended(request))

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        for observer in self.observers:
            observer.token_gaps(gaps)

    # ---- what has happened

    def find(self, name: str) -> list[dict[str, Any]]:
        """Timelines of a request by its id, running ones first: several for n > 1 or a name used again.

        Args:
            name: The engines' id, the `id` of an answer, or a client's `X-Request-Id`.
        """
        known = [*self._running.values(), *reversed(self._ended.values())]
        found = [request for request in known if request.request_id == name]
        if not found:
            named = names(name)
            found = [request for request in known if named.fullmatch(request.name)]
        return [request.as_json(self._unix_offset_s) for request in found]

    # ---- stages

    def _prefilled(self, request: Timeline, stay: Stay, now: float, prefill_s: float | None) -> None:
        begin = stay.begin
        if prefill_s is not None:
            begin = max(stay.begin, now - prefill_s)
            self._stage(request, "queue", stay.instance, stay.begin, begin)
        self._stage(request, "prefill", stay.instance, begin, now)
        stay.spoke_at = now
        if request.first_token_at is None:
            request.first_token_at = now
            self._tell(lambda observer: observer.first_token(request))

    def _leaves(self, request: Timeline, stay: Stay, now: float, *, ends: bool = False) -> None:
        stay.end = now
        if stay.spoke_at is not None and now > stay.spoke_at:
            name = "handoff" if stay.role == "prefill" and not ends else "decode"
            self._stage(request, name, stay.instance, stay.spoke_at, now)

    def _stage(self, request: Timeline, name: str, instance: str, begin: float, end: float) -> None:
        stage = Stage(name, instance, begin, end)
        request.stages.append(stage)
        self._tell(lambda observer: observer.stage(request, stage))

    def _downtime(self, request: Timeline, stay: Stay, migration: ObservedMigration) -> None:
        """Both its first token and the source's word are needed to know it; either may come first."""
        if stay.gap_s is not None:
            migration.downtime_s, stay.gap_s = stay.gap_s, None
            self._tell(lambda observer: observer.downtime(request, migration))

    def _tell(self, say: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            say(observer)


def names(request_id: str) -> re.Pattern[str]:
    """What vLLM may make of a client's `X-Request-Id`, or of the `id` in its answer."""
    return re.compile(rf"(?:(?:chat)?cmpl-|resp_)?{re.escape(request_id)}(?:[-_]\d+)?")
