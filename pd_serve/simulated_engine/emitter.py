"""The outputs of a simulated engine: sent once after each step, and again on demand."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from migration.ended_requests import EndedRequests
from migration.engine_interface import HeldByClient, HeldRequest
from migration.messages import RequestId, stem_of
from migration.token_span import TokenSpan, crc_of
from pd_serve.simulated_engine.outputs import SimulatedOutput
from pd_serve.simulated_engine.sequence import Sequence

#: Takes (client, outputs, spans) after every step; see `pd_serve.comm.messages.TokenHeader`.
OutputSink = Callable[[str, list[SimulatedOutput], list[TokenSpan]], None]


class SequenceEmitter:
    """Sends the outputs of one engine.

    Args:
        sequences: The engine's requests by id, arriving ones excepted.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        sequences: dict[str, Sequence],
        sink: OutputSink,
        clock: Callable[[], float],
        keep_ended_s: float = 0.0,
    ) -> None:
        self._sequences = sequences
        self._sink = sink
        self._ended = EndedRequests(clock, keep_ended_s)

    def emit(self, sampled: Iterable[Sequence], now: float) -> list[Sequence]:
        """Sends the tokens that have not been sent. Returns the sequences that have finished."""
        by_client: dict[str, tuple[list[SimulatedOutput], list[TokenSpan]]] = defaultdict(lambda: ([], []))
        ended = []
        for sequence in sampled:
            output, emitted = sequence.output, sequence.emitted
            reason = "length" if len(output) >= sequence.max_tokens else None
            outputs, spans = by_client[sequence.client]
            new = SimulatedOutput(
                sequence.request_id, output[emitted:], reason, delivered=sequence.delivered or None
            )
            if not emitted:
                new.times, new.prompt = sequence.times(now), (sequence.prompt_tokens, sequence.cached)
            outputs.append(new)
            spans.append((sequence.epoch, emitted, sequence.crc))
            sequence.told = sequence.client, sequence.epoch
            sequence.emitted, sequence.delivered = len(output), []
            sequence.crc = crc_of(output[emitted:], sequence.crc)
            if reason is not None:
                ended.append(sequence)
                self._ended.add(sequence.request_id, sequence.client, sequence.epoch, output, reason)
        for client, (outputs, spans) in by_client.items():
            self._sink(client, outputs, spans)
        return ended

    def held(self) -> HeldByClient:
        """See `migration.engine_interface.Engine.visit_requests`."""
        held: HeldByClient = defaultdict(list)
        for s in self._sequences.values():
            held[s.client].append(HeldRequest(s.request_id, s.epoch, s.emitted))
        for e in self._ended.reported():
            held[e.client].append(HeldRequest(e.request_id, e.epoch, len(e.output_token_ids), finished=True))
        return held

    def clients_of(self, stem: str) -> set[str]:
        """See `migration.engine_interface.Engine.clients_of`."""
        live = {sequence.client for name, sequence in self._sequences.items() if stem_of(name) == stem}
        return live | {ended.client for ended in self._ended.of_stem(stem)}

    def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> RequestId | None:
        """A request of the same stem is this one from now on; see `migration.engine_interface.Engine.adopt`.

        Returns: its former id; None if there is none.
        """
        if request_id in self._sequences:
            return None
        stem = stem_of(request_id)
        for former, sequence in self._sequences.items():
            if stem and stem_of(former) == stem and sequence.client not in living:
                del self._sequences[former]
                sequence.request_id, sequence.payload = request_id, payload
                sequence.client, sequence.epoch = client, 0
                self._sequences[request_id] = sequence
                return RequestId(former)
        return self._ended.adopt(request_id, client, living)

    def resend(self, asked: Iterable[tuple[RequestId, int]], now: float) -> None:
        """See `migration.engine_interface.Engine.resend`."""
        for request_id, index in asked:
            if (sequence := self._sequences.get(request_id)) is not None:
                tokens = sequence.output[index : sequence.emitted]
                output = SimulatedOutput(request_id, tokens, None)
                if not index:
                    output.times, output.prompt = (
                        sequence.times(now),
                        (sequence.prompt_tokens, sequence.cached),
                    )
                if tokens:
                    span = (sequence.epoch, index, crc_of(sequence.output[:index]))
                    self._sink(sequence.client, [output], [span])
            elif (ended := self._ended.get(request_id)) is not None:
                output = SimulatedOutput(request_id, ended.output_token_ids[index:], ended.finish_reason)
                span = (ended.epoch, index, crc_of(ended.output_token_ids[:index]))
                self._sink(ended.client, [output], [span])
