"""What an engine keeps of its requests beside vLLM's own state, and the outputs that it sends."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request

from migration.ended_requests import EndedRequests
from migration.engine_interface import HeldByClient, HeldRequest
from migration.messages import RequestId

#: (request's ownership epoch, index of the first new token), one per output, in the outputs' order.
TokenSpan = tuple[int, int]
OutputSink = Callable[[str, EngineCoreOutputs, list[TokenSpan]], None]


@dataclass(slots=True)
class LiveRequest:
    """A request in an engine.

    Attributes:
        payload: The request as the API server sent it, to be sent on unchanged.
        client: Endpoint that takes its tokens.
        epoch: Ownership epoch; tokens carry it.
        emitted: Output tokens sent to the client so far, by any instance: the index of the next one.
        request: vLLM's state of it.
        arriving: A migration brings it, and has not been committed.
    """

    payload: list[bytes]
    client: str
    epoch: int
    emitted: int
    request: Request
    arriving: bool = False


class LiveRequests(dict[str, LiveRequest]):
    """Requests by id. Belongs to the step thread."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = EndedRequests(time.monotonic)

    def of_client(self, client: str | None) -> Iterator[str]:
        """Ids of one client's requests, or of all."""
        return (request_id for request_id, live in self.items() if client in (None, live.client))

    def emit(self, outputs: dict[int, EngineCoreOutputs], sink: OutputSink) -> list[str]:
        """Sends a step's outputs to their clients. Returns the requests that have finished."""
        by_client: dict[str, tuple[list[EngineCoreOutput], list[TokenSpan]]] = defaultdict(lambda: ([], []))
        finished = []
        stats = None
        for batch in outputs.values():
            stats = batch.scheduler_stats or stats
            for output in batch.outputs:
                live = self.get(output.request_id)
                if live is None:
                    continue
                items, spans = by_client[live.client]
                items.append(output)
                spans.append((live.epoch, live.emitted))
                live.emitted += len(output.new_token_ids)
                if output.finish_reason is not None:
                    finished.append(output.request_id)
                    if _has_only_tokens(live.request):
                        self._keep(live, output)
        for client, (items, spans) in by_client.items():
            sink(client, EngineCoreOutputs(outputs=items, scheduler_stats=stats), spans)
            stats = None  # once is enough
        return finished

    def held(self) -> HeldByClient:
        """See `migration.engine_interface.Engine.visit_requests`."""
        held: HeldByClient = defaultdict(list)
        for request_id, live in self.items():
            if not live.arriving:
                held[live.client].append(HeldRequest(RequestId(request_id), live.epoch, live.emitted))
        for e in self._ended:
            held[e.client].append(HeldRequest(e.request_id, e.epoch, len(e.output_token_ids), finished=True))
        return held

    def resend(self, asked: Iterable[tuple[RequestId, int]], sink: OutputSink) -> None:
        """See `migration.engine_interface.Engine.resend`."""
        for request_id, index in asked:
            ended: dict[str, Any] = {}
            if (live := self.get(request_id)) is not None:
                if live.arriving or not _has_only_tokens(live.request):
                    continue
                client, epoch = live.client, live.epoch
                tokens = list(live.request.output_token_ids[index : live.emitted])
            elif (kept := self._ended.get(request_id)) is not None:
                client, epoch, tokens = kept.client, kept.epoch, kept.output_token_ids[index:]
                ended = {"finish_reason": kept.finish_reason, "stop_reason": kept.stop_reason}
            else:
                continue
            events = None if index else _began_now()
            output = EngineCoreOutput(request_id, tokens, events=events, **ended)
            sink(client, EngineCoreOutputs(outputs=[output]), [(epoch, index)])

    def _keep(self, live: LiveRequest, output: EngineCoreOutput) -> None:
        tokens = list(live.request.output_token_ids[: live.emitted])
        reasons = output.finish_reason, output.stop_reason
        self._ended.add(output.request_id, live.client, live.epoch, tokens, *reasons)


def _has_only_tokens(request: Request) -> bool:
    """Whether the outputs of a request can be made again from its output tokens."""
    parameters = request.sampling_params
    return (
        parameters is not None
        and parameters.logprobs is None
        and parameters.logprob_token_ids is None
        and parameters.prompt_logprobs is None
        and parameters.prompt_logprob_token_ids is None
    )


def _began_now() -> list[EngineCoreEvent]:
    """The events of a first output. vLLM's front end computes durations from them, and theirs are lost."""
    kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
    return [EngineCoreEvent.new_event(kind) for kind in kinds]
