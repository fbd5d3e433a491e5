"""Reconciles what instances have with what has been delivered, so that no lost message stops a stream.

Each instance reports its requests to their API server: epoch, and number of output tokens sent. A report is
in order with the tokens, so tokens that it counts and that have not been delivered are lost. It also has the
last heartbeat that the instance received, so a request that was sent before and is not in it is lost, too.
Lost tokens are sent again. Whatever else is lost is recomputed from the delivered tokens, which is always
right.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from pd_serve.comm.leases import LeaseClock, Leases, Silence
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import AbortRequests, RequestReport, ResendTokens
from pd_serve.comm.timing import INSTANCE_LEASE_S, RECOVERY_S
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.tracked_request import Check, Sighting, TrackedRequest
from pd_serve.observe.recorder import RecomputeReason, RequestRecorder

logger = logging.getLogger(__name__)

#: Numbers of reports in a row by which a request has more tokens than were delivered: its tokens are asked
#: for at the first ones, and it is recomputed at the last one.
RESEND_AT, RECOMPUTE_AT = (2, 4), 6

#: Numbers of reports in a row without a request after which it is recomputed: reports of an instance that has
#: received everything, and of one that may not have received the request yet.
MISSING_REPORTS, MAX_MISSING_REPORTS = 4, 40

#: An instance is out of reach if this many reports in a row show no later heartbeat, or if it has sent this
#: many reports that have not arrived.
DEAF_REPORTS, UNHEARD_REPORTS = 20, 40


class LossListener(Protocol):
    """Is told which requests are lost."""

    def lost(self, request: TrackedRequest, instance_id: str, reason: RecomputeReason) -> None:
        """The request has to be recomputed; what this instance has of it is to be ended."""

    def out_of_reach(self, instance_id: str) -> None:
        """The same for all requests of this instance."""

    def hears_none(self) -> None:
        """Neither the manager nor an instance has sent anything for `RECOVERY_S`."""


@dataclass(slots=True)
class _Reported:
    """Reports of one instance.

    Attributes:
        number, heartbeat: Of the last report.
        deaf: Reports in a row without a heartbeat that had been sent long before.
        sent: Number of the last report that it has sent.
        given_up: Value of `sent` when its requests were last recomputed.
    """

    number: int = 0
    heartbeat: int = 0
    deaf: int = 0
    sent: int = 0
    given_up: int = 0

    @property
    def is_unheard(self) -> bool:
        return self.sent - max(self.number, self.given_up) >= UNHEARD_REPORTS


class Reconciler:
    """Compares the reports of all instances with the requests of one API server.

    Args:
        requests: Requests in progress, by id.
        heartbeats: Returns the number of the last heartbeat that was sent.
    """

    def __init__(
        self,
        wire: MessageWire,
        instances: Instances,
        requests: Mapping[RequestId, TrackedRequest],
        listener: LossListener,
        recorder: RequestRecorder,
        heartbeats: Callable[[], int],
    ) -> None:
        self._wire = wire
        self._instances = instances
        self._requests = requests
        self._listener = listener
        self._recorder = recorder
        self._heartbeats = heartbeats
        self._reported: dict[str, _Reported] = {}
        self._clock = LeaseClock()
        self._leases = Leases(INSTANCE_LEASE_S, self._clock)
        self._silence = Silence()

    @property
    def silence_s(self) -> float:
        """For how long neither the manager nor an instance has sent anything, in seconds."""
        return self._silence.seconds

    # ---- from instances

    def on_message(self, sender: str) -> None:
        """Any message has arrived."""
        self._clock.on_message()
        if sender in self._instances:
            self._leases.renew(sender)
            self._silence.on_message()
        elif sender == MANAGER:
            self._silence.on_message()

    def on_load(self, instance_id: str, request_reports: int) -> bool:
        """A load report of a member has arrived. Returns whether it is in reach in both directions."""
        reported = self._reported_by(instance_id)
        reported.sent = max(reported.sent, request_reports)
        return reported.deaf < DEAF_REPORTS and not reported.sent - reported.number >= UNHEARD_REPORTS

    def instance_left(self, instance_id: str) -> None:
        self._reported.pop(instance_id, None)
        self._leases.drop(instance_id)

    def on_report(self, source: str, report: RequestReport) -> None:
        """Takes a report. One that is late or comes twice is ignored."""
        if source not in self._instances:
            return  # the membership, or the next report, arrives soon
        reported = self._reported_by(source)
        if report.number <= reported.number:
            return
        reported.number = report.number
        is_deaf = report.heartbeat <= reported.heartbeat and report.heartbeat + 1 < self._heartbeats()
        reported.deaf = reported.deaf + 1 if is_deaf else 0
        reported.heartbeat = max(reported.heartbeat, report.heartbeat)
        unknown = []
        for held in report.requests:
            request = self._requests.get(held.request_id)
            if request is None:
                if not held.finished:
                    unknown.append(held.request_id)
            elif held.epoch >= request.ledger.recomputed_epoch:
                self._note(request, source, held, report.number)
            elif not held.finished:
                self._count("outdated", 1)
                stale = AbortRequests([held.request_id], request.ledger.recomputed_epoch)
                self._wire.send(source, stale)
        if unknown:
            self._count("unknown", len(unknown))
            self._wire.send(source, AbortRequests(unknown))

    def _note(self, request: TrackedRequest, source: str, held: HeldRequest, number: int) -> None:
        """Notes that an instance has a request. The higher epoch is the owner, as long as it is reported."""
        seen = request.sighting
        if held.epoch < seen.epoch and self._is_current(seen):
            return
        request.sighting = Sighting(source, number, held.epoch, held.emitted, held.finished)
        if held.epoch > request.ledger.epoch:
            request.committed_to = source if source != request.ledger.owner else ""

    # ---- at every interval

    def check(self, interval_s: float) -> None:
        """Compares, and recovers what is lost. Call this every `interval_s`."""
        self._silence.on_heartbeat(interval_s)
        if self.silence_s >= RECOVERY_S:
            self._listener.hears_none()
        out_of_reach = self._out_of_reach()
        for instance_id in out_of_reach:
            self._instances.set_unreachable(instance_id)
        for instance_id in out_of_reach:
            self._listener.out_of_reach(instance_id)
        resend: defaultdict[str, list[tuple[RequestId, int]]] = defaultdict(list)
        for request in list(self._requests.values()):
            if request.ledger.owner:
                self._check(request, resend)
        for instance_id, asked in resend.items():
            self._count("resend", len(asked))
            self._wire.send(instance_id, ResendTokens(asked))

    def _check(self, request: TrackedRequest, resend: Mapping[str, list[tuple[RequestId, int]]]) -> None:
        ledger, check = request.ledger, request.check
        believed = request.committed_to or ledger.owner
        is_member = believed in self._instances
        reported = self._reported_by(believed) if is_member else _Reported()
        progress = (believed, ledger.recomputed_epoch, len(ledger.token_ids))
        if check.progress != progress:
            request.check = Check(progress, reported.number, self._heartbeats())
            return
        if is_member and reported.number == check.report:
            return
        check.report = reported.number
        seen = request.sighting
        is_held = seen.instance_id == believed and self._is_current(seen)
        if is_held and seen.epoch >= ledger.recomputed_epoch:
            check.missing = 0
            if seen.emitted <= len(ledger.token_ids) and not seen.finished:
                check.behind = 0
                return
            check.behind += 1
            if check.behind in RESEND_AT:
                resend[believed].append((request.request_id, len(ledger.token_ids)))
            elif check.behind >= RECOMPUTE_AT:
                self._listener.lost(request, believed, "tokens_lost")
            return
        check.missing += 1
        may_be_in_transit = is_member and reported.heartbeat <= check.heartbeat
        if check.missing >= (MAX_MISSING_REPORTS if may_be_in_transit else MISSING_REPORTS):
            self._listener.lost(request, believed, "request_lost")

    def _out_of_reach(self) -> list[str]:
        """Instances whose messages do not arrive; each once in the time of a lease."""
        silent = self._leases.expired()
        for instance_id in silent:
            self._leases.renew(instance_id)
        unheard = [name for name, reported in self._reported.items() if reported.is_unheard]
        for instance_id in unheard:
            self._reported[instance_id].given_up = self._reported[instance_id].sent
        return [*silent, *(name for name in unheard if name not in silent)]

    # ---- helpers

    def _reported_by(self, instance_id: str) -> _Reported:
        if (reported := self._reported.get(instance_id)) is None:
            reported = self._reported[instance_id] = _Reported()
        return reported

    def _is_current(self, seen: Sighting) -> bool:
        """Whether the last report of that instance has the request."""
        reported = self._reported.get(seen.instance_id)
        return reported is not None and seen.report == reported.number

    def _count(self, kind: str, number: int) -> None:
        self._recorder.reconciled(kind, number)
