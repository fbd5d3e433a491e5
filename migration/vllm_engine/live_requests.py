"""What an engine keeps of its requests beside vLLM's own state, and the outputs that it sends."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)
from vllm.v1.request import Request

from migration.ended_requests import EndedRequests
from migration.engine_interface import HeldByClient, HeldRequest
from migration.messages import RequestDescription, RequestId, stem_of
from migration.stem_index import StemIndex
from migration.token_span import TokenSpan, crc_of
from migration.vllm_engine.compatibility import UNMOVABLE, has_only_tokens, unmovable
from migration.vllm_engine.grammars import refusal

OutputSink = Callable[[str, EngineCoreOutputs, list[TokenSpan]], None]


@dataclass(slots=True)
class LiveRequest:
    """One stay of a request in an engine.

    Attributes:
        payload: The request as the API server sent it, to be sent on unchanged.
        client: Endpoint that takes its tokens.
        epoch: Ownership epoch; tokens carry it.
        request: vLLM's state of it.
        emitted: Output tokens sent to the client so far, by any instance: the index of the next one.
        crc: `crc_of` these.
        unmovable: Why it cannot move, one of `UNMOVABLE`; None if it can.
    """

    request_id: RequestId
    payload: list[bytes]
    client: str
    epoch: int
    request: Request
    emitted: int = 0
    crc: int = 0
    unmovable: str | None = None

    def __post_init__(self) -> None:
        self.unmovable = unmovable(self.request, self.payload)

    def describe(self, compatibility: dict[str, str]) -> RequestDescription:
        """What a destination needs; `compatibility` is what has to be equal there."""
        return RequestDescription(
            request_id=self.request_id,
            payload=self.payload,
            client=self.client,
            epoch=self.epoch,
            incarnation=self.request.num_preemptions,
            output_token_ids=list(self.request.output_token_ids),
            num_prompt_tokens=self.request.num_prompt_tokens,
            max_total_tokens=self.request.num_prompt_tokens + self.request.max_tokens,
            compatibility=compatibility,
        )


class LiveRequests:
    """All stays in an engine, by the id that vLLM knows each by. Belongs to the step thread.

    A request may leave and come back within one engine step. vLLM's ids are unique, so each stay has an id
    of its own (`RequestLoader.decode`), which outputs are translated from.

    Args:
        on_unmovable: Called with the number of requests here that cannot move, by reason, when it changes.
    """

    def __init__(
        self, keep_ended_s: float, on_unmovable: Callable[[dict[str, int]], None] = lambda numbers: None
    ) -> None:
        self._by_stay: dict[str, LiveRequest] = {}  # arriving ones included
        self._here: dict[RequestId, str] = {}  # arriving ones excluded
        self._stems = StemIndex()  # of those here
        self._ended = EndedRequests(time.monotonic, keep_ended_s)
        self._unmovable = dict.fromkeys(UNMOVABLE, 0)
        self._on_unmovable = on_unmovable

    def __getitem__(self, stay_id: str) -> LiveRequest:
        return self._by_stay[stay_id]

    def get(self, stay_id: str) -> LiveRequest | None:
        return self._by_stay.get(stay_id)

    def arrives(self, stay_id: str, live: LiveRequest) -> None:
        """A request is on its way here."""
        self._by_stay[stay_id] = live

    def enters(self, stay_id: str, live: LiveRequest) -> None:
        """A request is here from now on; an older stay of it has ended. Its tokens so far have been sent."""
        live.emitted, live.crc = live.request.num_output_tokens, crc_of(live.request.output_token_ids)
        self._by_stay[stay_id] = live
        self._here[live.request_id] = stay_id
        self._stems.add(live.request_id)
        self._count_unmovable(live, 1)

    def ends(self, stay_id: str) -> None:
        """Idempotent."""
        live = self._by_stay.pop(stay_id, None)
        if live is not None and self._here.get(live.request_id) == stay_id:
            del self._here[live.request_id]
            self._stems.discard(live.request_id)
            self._count_unmovable(live, -1)

    def _count_unmovable(self, live: LiveRequest, difference: int) -> None:
        if live.unmovable is not None:
            self._unmovable[live.unmovable] += difference
            self._on_unmovable(dict(self._unmovable))

    def stay_of(self, request_id: RequestId) -> str | None:
        """The id of a request that is here; None if it is not, or only on its way."""
        return self._here.get(request_id)

    def stays(self, client: str | None = None) -> list[str]:
        """Ids of all stays of one client's requests, or of all."""
        return [stay_id for stay_id, live in self._by_stay.items() if client in (None, live.client)]

    def clients_of(self, stem: str) -> set[str]:
        """See `migration.engine_interface.Engine.clients_of`."""
        live = {self._by_stay[self._here[request_id]].client for request_id in self._stems[stem]}
        return live | {ended.client for ended in self._ended.of_stem(stem)}

    def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> RequestId | None:
        """A stay, or the end, of another request of this stem is that of this request from now on.

        Returns: the other request; see `migration.engine_interface.Engine.adopt`.
        """
        if request_id in self._here:
            return None
        for former in self._stems[stem_of(request_id)]:
            stay_id = self._here[former]
            live = self._by_stay[stay_id]
            if live.client not in living:
                del self._here[former]
                self._stems.discard(former)
                live.request_id, live.payload, live.client, live.epoch = request_id, payload, client, 0
                self._here[request_id] = stay_id
                self._stems.add(request_id)
                return former
        return self._ended.adopt(request_id, client, living)

    def name_of(self, stay_id: str) -> RequestId:
        return self._by_stay[stay_id].request_id

    def request_ids(self, stay_ids: list[str]) -> list[RequestId]:
        return [self.name_of(stay_id) for stay_id in stay_ids]

    def describe(self, stay_ids: list[str], compatibility: dict[str, str]) -> list[RequestDescription]:
        """See `LiveRequest.describe`."""
        return [self._by_stay[stay_id].describe(compatibility) for stay_id in stay_ids]

    def emit(self, outputs: dict[int, EngineCoreOutputs], sink: OutputSink) -> list[str]:
        """Sends a step's outputs to their clients. Returns the stays that have finished.

        The `stop_reason` of an error that is the client's is the reason in words.
        """
        by_client: dict[str, tuple[list[EngineCoreOutput], list[TokenSpan]]] = defaultdict(lambda: ([], []))
        finished = []
        stats = None
        for batch in outputs.values():
            stats = batch.scheduler_stats or stats
            for output in batch.outputs:
                stay_id = output.request_id
                live = self._by_stay.get(stay_id)
                if live is None:
                    continue
                output.request_id = live.request_id
                items, spans = by_client[live.client]
                items.append(output)
                spans.append((live.epoch, live.emitted, live.crc))
                live.emitted += len(output.new_token_ids)
                live.crc = crc_of(output.new_token_ids, live.crc)
                if output.finish_reason is not None:
                    finished.append(stay_id)
                    if output.finish_reason == FinishReason.ERROR:
                        output.stop_reason = refusal(live.request)
                    if has_only_tokens(live.request.sampling_params):
                        self._keep(live, output)
        for client, (items, spans) in by_client.items():
            sink(client, EngineCoreOutputs(outputs=items, scheduler_stats=stats), spans)
            stats = None  # once is enough
        return finished

    def held(self) -> HeldByClient:
        """See `migration.engine_interface.Engine.visit_requests`."""
        held: HeldByClient = defaultdict(list)
        for request_id, stay_id in self._here.items():
            live = self._by_stay[stay_id]
            held[live.client].append(HeldRequest(request_id, live.epoch, live.emitted))
        for e in self._ended.reported():
            held[e.client].append(HeldRequest(e.request_id, e.epoch, len(e.output_token_ids), finished=True))
        return held

    def resend(self, asked: Iterable[tuple[RequestId, int]], sink: OutputSink) -> None:
        """See `migration.engine_interface.Engine.resend`."""
        for request_id, index in asked:
            end: dict[str, Any] = {}
            if (stay_id := self._here.get(request_id)) is not None:
                live = self._by_stay[stay_id]
                if not has_only_tokens(live.request.sampling_params):
                    continue
                client, epoch = live.client, live.epoch
                sent = list(live.request.output_token_ids[: live.emitted])
            elif (kept := self._ended.get(request_id)) is not None:
                client, epoch, sent = kept.client, kept.epoch, kept.output_token_ids
                end = {"finish_reason": kept.finish_reason, "stop_reason": kept.stop_reason}
            else:
                continue
            # One token each, as at first: vLLM's front end would count tokens behind a stop string, too.
            outputs = [EngineCoreOutput(request_id, [token]) for token in sent[index:]]
            if end:
                last = outputs.pop().new_token_ids if outputs else []
                outputs.append(EngineCoreOutput(request_id, last, **end))
            if not outputs:
                continue
            if not index:
                outputs[0].events = _began_now()
            crc = crc_of(sent[:index])
            spans: list[TokenSpan] = []
            for output in outputs:
                spans.append((epoch, index + len(spans), crc))
                crc = crc_of(output.new_token_ids, crc)
            sink(client, EngineCoreOutputs(outputs=outputs), spans)

    def _keep(self, live: LiveRequest, output: EngineCoreOutput) -> None:
        tokens = list(live.request.output_token_ids[: live.emitted])
        reasons = output.finish_reason, output.stop_reason
        self._ended.add(live.request_id, live.client, live.epoch, tokens, *reasons)


def _began_now() -> list[EngineCoreEvent]:
    """The events of a first output. vLLM's front end computes durations from them, and theirs are lost."""
    kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
    return [EngineCoreEvent.new_event(kind) for kind in kinds]
