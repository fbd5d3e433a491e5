"""Records the events of requests as timelines and passes them to observers. No I/O and no clock.

Metrics, log, traces and the live page are observers of the same recorder, so that all of them agree.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from migration.record import MigrationRecord
from pd_serve.comm.membership import InstanceInfo
from pd_serve.observe.timeline import ObservedMigration, RequestStage, Stay, Timeline
from router.request import NewRequest

#: Why a request is recomputed: its instance died; was stopped with it; has ended it, as the manager had
#: dropped this API server; could not be heard; has sent tokens that never arrived; or does not have it.
RecomputeReason = Literal["died", "stopped", "dropped", "out_of_reach", "tokens_lost", "request_lost", "fork"]

#: Ended requests whose timelines are kept.
KEEP_ENDED = 1000


class Observer:
    """Is called with the events of requests. Subclasses override the events that they use."""

    def instance_joined(self, info: InstanceInfo) -> None:
        """An instance is a member of the cluster. No migration of it was recorded before."""

    def instance_left(self, instance_id: str) -> None:
        """An instance is no member any more. Requests may still have to be sent elsewhere."""

    def issued(self, request: Timeline) -> None:
        """The request has arrived."""

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        """The request has been sent to an instance."""

    def first_token(self, request: Timeline) -> None:
        """The first token of the request has arrived."""

    def stage(self, request: Timeline, stage: RequestStage) -> None:
        """A stage of the request has ended."""

    def moved(self, request: Timeline, stay: Stay) -> None:
        """The first token of the request from another instance has arrived."""

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        """A migration of the request has ended, successfully or not."""

    def migration_ended(self, record: MigrationRecord) -> None:
        """A migration of a request of any API server has ended."""

    def downtime(self, request: Timeline, migration: ObservedMigration) -> None:
        """The downtime of a committed migration is known."""

    def lost(self, request: Timeline, instance: str, reason: RecomputeReason) -> None:
        """The request was lost with or on an instance, and is recomputed."""

    def ended(self, request: Timeline) -> None:
        """The request has ended."""

    def reconciled(self, kind: str, number: int) -> None:
        """Lost messages of this many requests were noticed; see `pd_serve.frontend.reconciler`."""

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        """Numbers of tokens by the gap before them, in seconds; called once per message of an engine."""


class RequestRecorder:
    """Timelines of the requests of one API server: all running ones, and the latest ended ones.

    Events of unknown requests are ignored.

    Args:
        observers: Called with every event, in this order.
        unix_offset_s: Added to a time of the clock, it gives Unix time.
        keep_ended: Number of ended requests to keep.
    """

    def __init__(
        self,
        observers: Iterable[Observer] = (),
        *,
        unix_offset_s: float = 0.0,
        keep_ended: int = KEEP_ENDED,
    ) -> None:
        self._observers = tuple(observers)
        self._unix_offset_s = unix_offset_s
        self._keep_ended = keep_ended
        self._running: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()

    # ---- events

    def instance_joined(self, info: InstanceInfo) -> None:
        self._tell(lambda observer: observer.instance_joined(info))

    def instance_left(self, instance_id: str) -> None:
        self._tell(lambda observer: observer.instance_left(instance_id))

    def issued(
        self,
        request_id: str,
        now: float,
        new: NewRequest,
        *,
        name: str = "",
        client_id: str = "",
        trace_headers: Mapping[str, str] | None = None,
    ) -> None:
        request = Timeline(
            request_id,
            name or request_id,
            now,
            new.prompt_tokens,
            new.priority,
            trace_headers,
            client_id=client_id,
            slo=new.slo,
            account=new.account,
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

    def first_token_from(
        self,
        request_id: str,
        instance: str,
        role: str,
        now: float,
        *,
        gap_s: float = 0.0,
        prefill_s: float | None = None,
    ) -> None:
        """The first token of a request from an instance has arrived.

        Args:
            gap_s: Time since the last token of the previous instance.
            prefill_s: Time since the prefill on the instance began; None if the engine does not report it.
        """
        request = self._running.get(request_id)
        if request is None or not request.stays:
            return
        stay = request.stays[-1]
        if stay.first_token_at is None:
            self._prefilled(request, stay, now, prefill_s if stay.instance == instance else None)
        if stay.instance != instance:
            self._leaves(request, stay, now)
            stay = Stay(instance, role, now, first_token_at=now, gap_s=gap_s)
            request.stays.append(stay)
            self._tell(lambda observer: observer.moved(request, stay))
            moves = [m for m in request.migrations if m.record.committed]
            arrived = [m for m in moves if m.record.destination == instance]
            if arrived and arrived[-1].downtime_s is None:
                self._downtime(request, stay, arrived[-1])

    def migrated(self, record: MigrationRecord, now: float) -> None:
        """A record of a finished migration has arrived: before or after the destination's first token."""
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

    def lost(self, request_id: str, instance: str, reason: RecomputeReason, now: float) -> None:
        if (request := self._running.get(request_id)) is None:
            return
        if request.stays:
            self._leaves(request, request.stays[-1], now)
        request.recomputes += 1
        request.waits_since = now
        self._tell(lambda observer: observer.lost(request, instance, reason))

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

    def reconciled(self, kind: str, number: int) -> None:
        self._tell(lambda observer: observer.reconciled(kind, number))

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        self._tell(lambda observer: observer.token_gaps(gaps))

    # ---- queries

    def find(self, name: str) -> list[dict[str, Any]]:
        """Timelines of a request by any of its names, running ones first.

        There are several for n > 1, or if a name was used again.

        Args:
            name: The engines' id, the `id` of a response, or a client's `X-Request-Id`.
        """
        known = [*self._running.values(), *reversed(self._ended.values())]
        found = [request for request in known if request.request_id == name]
        if not found:
            found = [request for request in known if is_named(name, request.name, request.client_id)]
        return [request.as_json(self._unix_offset_s) for request in found]

    # ---- stages

    def _prefilled(self, request: Timeline, stay: Stay, now: float, prefill_s: float | None) -> None:
        begin = stay.begin
        if prefill_s is not None:
            begin = max(stay.begin, now - prefill_s)
            self._stage(request, "queue", stay.instance, stay.begin, begin)
        self._stage(request, "prefill", stay.instance, begin, now)
        stay.first_token_at = now
        if request.first_token_at is None:
            request.first_token_at = now
            self._tell(lambda observer: observer.first_token(request))

    def _leaves(self, request: Timeline, stay: Stay, now: float, *, ends: bool = False) -> None:
        stay.end = now
        if stay.first_token_at is not None and now > stay.first_token_at:
            name = "handoff" if stay.role == "prefill" and not ends else "decode"
            self._stage(request, name, stay.instance, stay.first_token_at, now)

    def _stage(self, request: Timeline, name: str, instance: str, begin: float, end: float) -> None:
        stage = RequestStage(name, instance, begin, end)
        request.stages.append(stage)
        self._tell(lambda observer: observer.stage(request, stage))

    def _downtime(self, request: Timeline, stay: Stay, migration: ObservedMigration) -> None:
        """Assigns the gap before the first token of an instance to the migration that brought the request."""
        if stay.gap_s is not None:
            migration.downtime_s, stay.gap_s = stay.gap_s, None
            self._tell(lambda observer: observer.downtime(request, migration))

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            event(observer)


def is_named(name: str, vllm_id: str, client_id: str = "") -> bool:
    """Whether a request has this name.

    Args:
        name: The client's own id, vLLM's id, or the `id` of the answer.
        vllm_id: What vLLM's route has made: of the client's id, of one in the body, or at random.
        client_id: The client's `X-Request-Id`; "" without one.
    """
    if not name or name in (vllm_id, client_id):
        return bool(name)
    if client_id and client_id in vllm_id and client_id not in name:
        return False  # "call" is no name of "chatcmpl-call-1", which is the client's "call-1"
    return names(name).fullmatch(vllm_id) is not None


def names(request_id: str) -> re.Pattern[str]:
    """Matches what vLLM's routes make of an id: one in front, a number for each prompt or choice behind."""
    prefixes = "chatcmpl-|cmpl-|resp_|generate-tokens-|generative-scoring-|decision-"
    return re.compile(rf"(?:{prefixes})?{re.escape(request_id)}(?:[-_]\d+)?")
