"""Passes tokens from instances to clients: each index once and in order, from any instance."""

from collections.abc import Callable, Mapping
from typing import Protocol

from migration.messages import RequestId
from migration.token_span import TokenSpan
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import AbortRequests, RequestReport
from pd_serve.comm.outputs import OutputBatch, RequestOutput
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.output_codec import OutputCodec
from pd_serve.frontend.tracked_request import TrackedRequest
from pd_serve.observe.recorder import RecomputeReason, RequestRecorder

#: Called with (request, instance, tokens so far, time in s) at every delivery; for measurements.
TokenObserver = Callable[[RequestId, str, int, float], None]


class TokenListener(Protocol):
    """Called on events in a request's tokens."""

    def first_token(self, request: TrackedRequest) -> None:
        """The first token has been delivered."""

    def owner_changed(self, request: TrackedRequest) -> None:
        """A token has come from another instance than before."""

    def first_token_of_owner(self, request: TrackedRequest, now: float, prefill_s: float | None) -> None:
        """The present owner's first token has been delivered; `prefill_s` is the duration of its prefill."""

    def lost(self, request: TrackedRequest, instance_id: str, reason: RecomputeReason) -> None:
        """The owner's copy does not continue the delivered tokens."""

    def finished(self, request: TrackedRequest, outcome: str) -> None:
        """The last token has been delivered."""

    def refused(self, request: TrackedRequest, why: str) -> None:
        """An engine has ended it with an error that is its client's; its last output is not delivered."""


class TokenStream:
    """Receives the outputs of all instances, and delivers the next tokens of every request.

    Args:
        requests: Requests in progress, by id.
        deliver: Receives batches of outputs.
        clock: Clock of the deliveries, in seconds.
        on_report: Called with an instance and its report of requests.

    Attributes:
        observer: Called at every delivery; None outside of measurements.
    """

    def __init__(
        self,
        wire: MessageWire,
        instances: Instances,
        requests: Mapping[RequestId, TrackedRequest],
        codec: OutputCodec,
        deliver: Callable[[OutputBatch], None],
        recorder: RequestRecorder,
        listener: TokenListener,
        clock: Callable[[], float],
        on_report: Callable[[str, RequestReport], None],
    ) -> None:
        self._wire = wire
        self._instances = instances
        self._requests = requests
        self._codec = codec
        self._deliver = deliver
        self._recorder = recorder
        self._listener = listener
        self._clock = clock
        self._on_report = on_report
        self.observer: TokenObserver | None = None

    def on_frames(self, frames: list[bytes]) -> None:
        """Receives the outputs of one step of one instance, or its report of requests."""
        header, batch = self._codec.decode(frames)
        source = header.instance_id
        if header.report is not None:
            return self._on_report(source, header.report)
        if source not in self._instances:
            # The instance has left, and a late token would make it the owner again; or its membership has
            # not arrived, and what is dropped here is sent again.
            return
        now = self._clock()
        deliver: list[RequestOutput] = []
        #: Number of outputs by time of the delivery before, which is the same for most outputs of a step.
        gaps: dict[float, int] = {}
        for output, span in zip(batch.outputs, header.spans, strict=True):
            request = self._requests.get(output.request_id)
            if request is None:
                if output.finish_reason is None:
                    self._end_copy(source, RequestId(output.request_id), None)
                continue
            before = request.ledger.extend(source, span, output, now)
            if before is not None:
                deliver.append(output)
                gaps[before] = gaps.get(before, 0) + 1
                if self.observer is not None:
                    self.observer(request.request_id, source, span[1] + len(output.new_token_ids), now)
                continue
            before = request.ledger.last_token_at
            if ready := self._accept(request, source, span, output, batch, now):
                deliver += ready
                if before:
                    gaps[before] = gaps.get(before, 0) + 1
        if gaps:
            self._recorder.token_gaps({now - at: number for at, number in gaps.items()})
        if deliver or batch.scheduler_stats is not None:
            batch.outputs = deliver
            batch.engine_index = self._instances.slot_of(source)
            self._deliver(batch)

    def _accept(
        self,
        request: TrackedRequest,
        source: str,
        span: TokenSpan,
        output: RequestOutput,
        batch: OutputBatch,
        now: float,
    ) -> list[RequestOutput]:
        """Takes an output that `TokenLedger.extend` did not take. Returns the outputs to deliver."""
        ledger, listener = request.ledger, self._listener
        had_tokens, moves, delivered = bool(ledger.token_ids), ledger.num_moves, ledger.delivered_epoch
        ready, is_stale, is_fork = ledger.accept(source, span, output, now)
        if is_stale:
            self._end_copy(source, request.request_id, span[0] + 1)  # this copy, not a later one
        if ledger.token_ids and not had_tokens:
            listener.first_token(request)
        if ledger.num_moves != moves:
            listener.owner_changed(request)
        if ledger.delivered_epoch != delivered:
            listener.first_token_of_owner(request, now, self._codec.prefill_s(batch, output))
        if ready and self.observer is not None:
            self.observer(request.request_id, source, len(ledger.token_ids), now)
        if request.move_waiters and ledger.has_token_of_owner:
            request.wake_move_waiters()
        if ledger.finished:
            outcome, why = str(ready[-1].finish_reason), ready[-1].stop_reason
            if outcome == "error" and isinstance(why, str):
                listener.refused(request, why)
                return []
            listener.finished(request, outcome)
        if is_fork:
            listener.lost(request, source, "fork")
        return ready

    def _end_copy(self, source: str, request_id: RequestId, below_epoch: int | None) -> None:
        """Ends an outdated copy of a request on the instance `source`."""
        self._wire.send(source, AbortRequests([request_id], below_epoch))
