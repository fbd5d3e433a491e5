"""The requests that have ended in an engine a short while ago, whose last outputs may have been lost."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from migration.messages import RequestId

#: Time that an ended request is kept, in seconds. An API server asks for lost outputs within half of it.
KEPT_S = 10.0

#: Maximum number of ended requests that are kept.
MAX_KEPT = 4096


class EndedRequest(NamedTuple):
    """A request that has finished here.

    Attributes:
        client: Endpoint that takes its tokens.
        epoch: Ownership epoch of its last output.
        output_token_ids: All output tokens.
        finish_reason, stop_reason: As in its last output.
        ended_at: Time of its end, in seconds.
    """

    request_id: RequestId
    client: str
    epoch: int
    output_token_ids: list[int]
    finish_reason: object
    stop_reason: object
    ended_at: float


class EndedRequests:
    """The latest finished requests of one engine, by id.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: OrderedDict[str, EndedRequest] = OrderedDict()

    def __iter__(self) -> Iterator[EndedRequest]:
        self._expire()
        return iter(self._requests.values())

    def get(self, request_id: str) -> EndedRequest | None:
        return self._requests.get(request_id)

    def add(
        self,
        request_id: str,
        client: str,
        epoch: int,
        output_token_ids: list[int],
        finish_reason: object,
        stop_reason: object = None,
    ) -> None:
        self._expire()
        self._requests[request_id] = EndedRequest(
            RequestId(request_id), client, epoch, output_token_ids, finish_reason, stop_reason, self._clock()
        )
        self._requests.move_to_end(request_id)
        if len(self._requests) > MAX_KEPT:
            self._requests.popitem(last=False)

    def _expire(self) -> None:
        oldest = self._clock() - KEPT_S
        while self._requests and next(iter(self._requests.values())).ended_at < oldest:
            self._requests.popitem(last=False)
