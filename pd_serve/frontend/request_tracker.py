"""The requests of one API server, from arrival to end, on whichever instance they run."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from migration.messages import RequestId
from migration.record import MigrationRecord
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import AbortRequests, LoadReport, RequestFailed
from pd_serve.comm.outputs import OutputBatch
from pd_serve.comm.timing import RECOVERY_S
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.accounts import Accounts
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.outage import Outage
from pd_serve.frontend.output_codec import OutputCodec
from pd_serve.frontend.placement import RequestPlacement
from pd_serve.frontend.recovery import Recovery
from pd_serve.frontend.suspects import Suspects
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.frontend.tracked_request import TrackedRequest
from pd_serve.observe.recorder import RecomputeReason, RequestRecorder
from router.request import NewRequest
from router.slo import NO_SLO

logger = logging.getLogger(__name__)

#: How often one request is recomputed, though its instances live, before its client gets an error.
MAX_LOSSES = 10


class RequestTracker:
    """Starts requests, follows their owners, and recomputes requests that were lost with an instance.

    Args:
        codec: Encodes an error output.
        deliver: Receives batches of outputs.
        recorder: Records the events of every request.
        clock: Clock of the recorded times, in seconds.
        accounts: Charged for outputs.
        outage: Tells whether new requests are served, or wait until they are.

    Attributes:
        requests: Requests in progress, by id.
        waiting: Those of them without a first token.
        migrations: Committed and aborted migrations of all API servers' requests, by reason.
        unavailable: Called with the id of a request that ends without output because no instance takes it,
            and the reason. By default it ends like any other failed request.
        invalid: The same for one that no engine can serve because of its parameters.
    """

    def __init__(
        self,
        wire: MessageWire,
        instances: Instances,
        placement: RequestPlacement,
        codec: OutputCodec,
        deliver: Callable[[OutputBatch], None],
        recorder: RequestRecorder,
        clock: Callable[[], float],
        accounts: Accounts,
        outage: Outage,
    ) -> None:
        self._wire = wire
        self._instances = instances
        self._placement = placement
        self._codec = codec
        self._deliver = deliver
        self._recorder = recorder
        self._clock = clock
        self._accounts = accounts
        self._outage = outage
        self.requests: dict[RequestId, TrackedRequest] = {}
        self.waiting: dict[RequestId, TrackedRequest] = {}
        self.migrations: dict[str, Counter[str]] = {"handoff": Counter(), "manual": Counter()}
        self.unavailable: Callable[[str, str], None] = lambda request_id, why: self._deliver(
            self._codec.failed(request_id)
        )
        self.invalid = self.unavailable
        self._suspects = Suspects(self.requests)
        self._recovery = Recovery(placement, self._suspects, self._on_recovered, self._on_given_up)

    def close(self) -> None:
        self._recovery.close()

    # ---- from clients

    def submit(
        self,
        request_id: str,
        payload: list[bytes],
        new: NewRequest,
        *,
        max_tokens: int | None = None,
        name: str = "",
        client_id: str = "",
        trace_headers: Mapping[str, str] | None = None,
        holder: str = "",
    ) -> TrackedRequest:
        """Starts a request.

        Args:
            payload: The request in the engine's encoding.
            max_tokens: Maximum number of output tokens, if known; a request of one needs no decode instance.
            name: vLLM's id of the request, which its answer has, too.
            client_id: The client's own id of the request; "" without one.
            trace_headers: The client's trace context headers, such as `traceparent`.
            holder: Instance that has it already; see `pd_serve.frontend.adoption`. It is not started then.

        Raises:
            EngineDeadError: No live instance takes new requests, and none will soon.
        """
        if holder:
            new = replace(new, slo=NO_SLO)  # it is not known when it arrived
        request = TrackedRequest(RequestId(request_id), payload, new, TokenLedger(holder), max_tokens)
        request.arrived_at = self._placement.now
        self._recorder.issued(
            request_id, self._clock(), new, name=name, client_id=client_id, trace_headers=trace_headers
        )
        if holder:
            self._recorder.dispatched(request_id, holder, self._instances.role_of(holder), self._clock())
        is_placed = bool(holder) or self._placement.start(request)
        if not is_placed and not self._outage.takes_requests():
            self._recorder.ended(request_id, "error", self._clock())
            raise EngineDeadError("no live instance takes new requests; see GET /cluster")
        self.requests[request.request_id] = request
        self.waiting[request.request_id] = request
        if not is_placed:
            self._recovery.add(request)
        return request

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def first_token_s(self, new: NewRequest, arriving_tokens: int) -> float | None:
        """Predicts the time to a new request's first token; see `ClusterView.first_token_s`."""
        return self._placement.first_token_s(new, self.waiting.values(), arriving_tokens)

    def continue_on(self, request: TrackedRequest, holder: str) -> None:
        """Expects a request from another holder, or starts it if that is "": the last one did not have it.

        Does nothing if it has ended or been recovered meanwhile.
        """
        if self.requests.get(request.request_id) is request and not request.ledger.epoch:
            request.ledger.owner = holder
            if not holder:
                self._recovery.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """Aborts requests on their owners. Unknown ids are ignored."""
        by_owner: dict[str, list[RequestId]] = {}
        for request_id in request_ids:
            request = self.requests.get(RequestId(request_id))
            if request is not None:
                by_owner.setdefault(request.ledger.owner, []).append(request.request_id)
                self._end(request, "abort")
        for owner, owned in by_owner.items():
            self._wire.send(owner, AbortRequests(owned))

    # ---- from instances

    def on_load(self, instance_id: str, report: LoadReport) -> None:
        """Gives waiting requests to an instance that reports room, and hands off its stranded requests."""
        if self._placement.line:
            self._place_waiting(instance_id)
        for request_id in report.stranded:
            if (request := self.requests.get(request_id)) is not None:
                self._placement.hand_off_stranded(instance_id, request)

    def on_migration_ended(self, record: MigrationRecord) -> None:
        self.migrations.setdefault(record.reason, Counter())[record.outcome] += 1
        self._recorder.migrated(record, self._clock())
        request = self.requests.get(record.request_id)
        if request is None:
            return
        if not record.committed:
            self._placement.settle(request, record.destination)
        elif request.is_on(record.source):
            # If the destination dies before its first token, the request has to be recomputed.
            if record.destination in self._instances:
                request.committed_to = record.destination
            else:
                self._recompute(request, record.destination, "died")

    def on_request_failed(self, message: RequestFailed) -> None:
        if (request := self.requests.get(message.request_id)) is not None:
            if message.is_invalid:
                return self.refused(request, message.error)
            logger.error("request %s: %s", request.request_id, message.error)
            self._fail(request)

    def instance_left(self, instance_id: str, *, died: bool) -> None:
        """Recomputes the requests of an instance that died or was stopped."""
        lost = [request for request in self.requests.values() if request.is_on(instance_id)]
        if died:
            for request in self._suspects.blame(lost):
                logger.error(
                    "request %s: its instances died %d times", request.request_id, request.deaths_in_a_row
                )
                self._fail(request)
        for request in list(self.requests.values()):
            # With a gap, the instance may have been an earlier owner whose last tokens were lost.
            if request.is_on(instance_id):
                self._recompute(request, instance_id, "died" if died else "stopped")
            elif request.ledger.has_gap:
                self._recompute(request, instance_id, "tokens_lost")
        self.bound_waits()

    def bound_waits(self) -> None:
        """Requests wait in line while instances serve, and otherwise with those that were lost: for a time.

        To be called regularly.
        """
        self._outage.look()
        if self._placement.line and not self._placement.is_serving:
            for request_id in list(self._placement.line):
                self._placement.line.discard(request_id)
                self._recovery.add(self.requests[RequestId(request_id)])

    def recompute(self, requests: list[TrackedRequest]) -> None:
        """The instances have ended these, though they live."""
        for request in requests:
            if self.requests.get(request.request_id) is request and request.ledger.owner:
                self._recompute(request, request.ledger.owner, "dropped")

    # ---- LossListener

    def lost(self, request: TrackedRequest, instance_id: str, reason: RecomputeReason) -> None:
        self._recorder.reconciled("out_of_reach" if reason == "out_of_reach" else "recompute", 1)
        request.losses += 1
        if request.losses > MAX_LOSSES:
            logger.error("request %s: it was lost %d times", request.request_id, request.losses)
            self._fail(request)
            self._wire.send(instance_id, AbortRequests([request.request_id]))
            return
        self._recompute(request, instance_id, reason)
        self._wire.send(instance_id, AbortRequests([request.request_id], request.ledger.recomputed_epoch))

    def out_of_reach(self, instance_id: str) -> None:
        for request in list(self.requests.values()):
            if request.is_on(instance_id):
                self.lost(request, instance_id, "out_of_reach")

    def hears_none(self) -> None:
        for request in list(self.requests.values()):
            self._give_up(request, "neither the manager nor an instance has sent anything")

    def is_unused(self, instance_id: str) -> bool:
        """Whether an instance drains and is empty, and no request is on its way there."""
        load = self._instances.load_of(instance_id)
        if load is None or not load.draining or not load.is_empty:
            return False
        return not any(request.is_on(instance_id) for request in self.requests.values())

    # ---- TokenListener

    def first_token(self, request: TrackedRequest) -> None:
        del self.waiting[request.request_id]

    def owner_changed(self, request: TrackedRequest) -> None:
        self._placement.settle(request)
        if request.ledger.owner == request.committed_to:
            request.committed_to = ""

    def first_token_of_owner(self, request: TrackedRequest, now: float, prefill_s: float | None) -> None:
        owner = request.ledger.owner
        role = self._instances.role_of(owner)
        gap_s = request.ledger.last_gap_s
        self._recorder.first_token_from(
            request.request_id, owner, role, now, gap_s=gap_s, prefill_s=prefill_s
        )

    def finished(self, request: TrackedRequest, outcome: str) -> None:
        self._end(request, outcome)

    def refused(self, request: TrackedRequest, why: str) -> None:
        logger.warning("request %s: %s", request.request_id, why)
        self._end(request, "error")
        self.invalid(request.request_id, why)

    # ---- timelines, waiting line, recomputes, ends

    def find(self, name: str) -> list[dict[str, Any]]:
        """Timelines of requests by name, with the present numbers of tokens; see `RequestRecorder.find`."""
        found = self._recorder.find(name)
        for timeline in found:
            if (request := self.requests.get(timeline["id"])) is not None:
                timeline["output_tokens"] = len(request.ledger.token_ids)
                timeline["longest_gap_s"] = round(request.ledger.longest_gap_s, 6)
        return found

    def _place_waiting(self, instance_id: str) -> None:
        for request_id in self._placement.line.take(instance_id, self._placement.now):
            request = self.requests[RequestId(request_id)]
            if not self._placement.place(request):
                self._recovery.add(request)

    def _recompute(self, request: TrackedRequest, lost: str, reason: RecomputeReason) -> None:
        """Continues a request that was lost with an instance, after the tokens that the client has."""
        self._recorder.lost(request.request_id, lost, reason, self._clock())
        logger.warning(
            "request %s: lost with %s after token %d", request.request_id, lost, len(request.ledger.token_ids)
        )
        request.committed_to = ""
        self._placement.settle(request)
        request.ledger.take_over("")
        self._recovery.add(request)

    def _on_recovered(self, request: TrackedRequest) -> None:
        if request.ledger.owner:
            logger.warning("request %s: %s recomputes it", request.request_id, request.ledger.owner)

    def _on_given_up(self, request: TrackedRequest) -> None:
        self._give_up(request, "no instance has taken requests")

    def _give_up(self, request: TrackedRequest, why: str) -> None:
        why = f"{why} for {RECOVERY_S:.0f} s"
        logger.error("request %s: %s", request.request_id, why)
        if request.ledger.token_ids:
            self._fail(request)
        else:
            self._end(request, "error")
            self.unavailable(request.request_id, why)

    def _fail(self, request: TrackedRequest) -> None:
        self._end(request, "error")
        self._deliver(self._codec.failed(request.request_id))

    def _end(self, request: TrackedRequest, outcome: str) -> None:
        del self.requests[request.request_id]
        self._accounts.charge([request])
        tokens, longest_gap_s = len(request.ledger.token_ids), request.ledger.longest_gap_s
        self._recorder.ended(
            request.request_id, outcome, self._clock(), tokens=tokens, longest_gap_s=longest_gap_s
        )
        self._recovery.discard(request.request_id)
        self._suspects.forget(request.request_id)
        if self.waiting.pop(request.request_id, None) is not None and not request.ledger.owner:
            self._placement.line.discard(request.request_id)
        self._placement.settle(request)
        request.wake_move_waiters()
