"""The requests that have ended in an engine a short while ago, whose last outputs may have been lost."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from migration.messages import RequestId, stem_of
from migration.stem_index import StemIndex

#: Time that an ended request is reported, and at least kept, in seconds. An API server asks for lost outputs
#: within half of it.
REPORTED_S = 10.0

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
        kept_s: Time that they are kept, in seconds, for clients that come back.
    """

    def __init__(self, clock: Callable[[], float], kept_s: float = REPORTED_S) -> None:
        self._clock = clock
        self._kept_s = max(kept_s, REPORTED_S)
        self._requests: OrderedDict[RequestId, EndedRequest] = OrderedDict()
        self._stems = StemIndex()

    def __iter__(self) -> Iterator[EndedRequest]:
        self._expire()
        return iter(self._requests.values())

    def reported(self) -> Iterator[EndedRequest]:
        """Those that have ended within `REPORTED_S`, the latest first."""
        oldest = self._clock() - REPORTED_S
        return itertools.takewhile(lambda ended: ended.ended_at >= oldest, reversed(self._requests.values()))

    def get(self, request_id: RequestId) -> EndedRequest | None:
        return self._requests.get(request_id)

    def of_stem(self, stem: str) -> list[EndedRequest]:
        """Those whose ids have this stem, the latest first."""
        self._expire()
        return [self._requests[request_id] for request_id in reversed(self._stems[stem])]

    def adopt(self, request_id: RequestId, client: str, living: Collection[str]) -> RequestId | None:
        """Gives a request of the same stem, whose client is not a living one, this id and client, epoch 0.

        Returns: its former id; None if there was none.
        """
        for ended in self.of_stem(stem_of(request_id)):
            if ended.client not in living:
                former = ended.request_id
                self._remove(former)
                self.add(
                    request_id, client, 0, ended.output_token_ids, ended.finish_reason, ended.stop_reason
                )
                return former
        return None

    def add(
        self,
        request_id: RequestId,
        client: str,
        epoch: int,
        output_token_ids: list[int],
        finish_reason: object,
        stop_reason: object = None,
    ) -> None:
        self._expire()
        self._remove(request_id)
        self._requests[request_id] = EndedRequest(
            request_id, client, epoch, output_token_ids, finish_reason, stop_reason, self._clock()
        )
        self._stems.add(request_id)
        if len(self._requests) > MAX_KEPT:
            self._remove(next(iter(self._requests)))

    def _remove(self, request_id: RequestId) -> None:
        if self._requests.pop(request_id, None) is not None:
            self._stems.discard(request_id)

    def _expire(self) -> None:
        oldest = self._clock() - self._kept_s
        while self._requests and (first := next(iter(self._requests.values()))).ended_at < oldest:
            self._remove(first.request_id)
