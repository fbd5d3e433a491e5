"""What an engine keeps of its requests beside vLLM's own state, and the outputs that it sends."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

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
    """

    payload: list[bytes]
    client: str
    epoch: int
    emitted: int


class LiveRequests(dict[str, LiveRequest]):
    """Requests by id. Belongs to the step thread."""

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
        for client, (items, spans) in by_client.items():
            sink(client, EngineCoreOutputs(outputs=items, scheduler_stats=stats), spans)
            stats = None  # once is enough
        return finished
