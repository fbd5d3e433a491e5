"""Overload protection: requests are refused before they are tokenized.

A request is *arriving* from the moment its body is complete until the engine client has passed it to the
cluster, which counts it as waiting from then on. Both count towards the limit: in a burst, all requests are
still arriving when the last one is checked.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.errors import error_response
from pd_serve.observe.metrics import REFUSED_REQUESTS

GENERATING_PATHS = frozenset(
    {
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/systemone",
    }
)


#: Header of refusals, in seconds.
RETRY_AFTER = {"Retry-After": "1"}


# Ends the arrival of this request. Inherited by the tasks that vLLM's handlers start.
_end_arrival: ContextVar[Callable[[], None]] = ContextVar("pd_serve_end_arrival", default=lambda: None)


def mark_submitted() -> None:
    """Marks the request of this task as passed to the cluster, or refused by it."""
    _end_arrival.get()()


class OverloadMiddleware:
    """Answers 503 while no instance is live and 429 while too many requests wait.

    Pure ASGI: streams and the detection of disconnected clients work as without it. Refusals by the cluster
    and by vLLM (`--max-num-queued-reqs`) get their `Retry-After` here too.

    Args:
        cluster: Asked for `num_live` and `num_waiting` on every generating request.
        max_waiting: Requests that may wait for their first token; None for no limit.

    Attributes:
        arriving: Requests whose body is complete and which the cluster does not count yet.
    """

    def __init__(self, app: ASGIApp, *, cluster: ClusterView, max_waiting: int | None = None) -> None:
        self.app = app
        self.arriving: set[object] = set()
        self._cluster = cluster
        self._max_waiting = max_waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if scope["path"].removeprefix(scope.get("root_path", "")) not in GENERATING_PATHS:
            return await self.app(scope, receive, send)
        refusal = self._refusal()
        if refusal is not None:
            REFUSED_REQUESTS.labels(str(refusal.status_code)).inc()
            return await refusal(scope, receive, send)

        arrival = object()
        end_arrival = partial(self.arriving.discard, arrival)

        async def receive_and_count() -> Message:
            message = await receive()
            # Not earlier: a slow upload must not count towards the limit.
            if message["type"] == "http.request" and not message.get("more_body", False):
                self.arriving.add(arrival)
            return message

        async def send_with_hint(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                REFUSED_REQUESTS.labels(str(message["status"])).inc()
                MutableHeaders(scope=message).setdefault("Retry-After", RETRY_AFTER["Retry-After"])
            await send(message)

        token = _end_arrival.set(end_arrival)
        try:
            await self.app(scope, receive_and_count, send_with_hint)
        finally:
            end_arrival()
            _end_arrival.reset(token)

    def _refusal(self) -> JSONResponse | None:
        if self._cluster.num_live == 0:
            return error_response(503, "No instance is available.", headers=RETRY_AFTER)
        waiting = self._cluster.num_waiting + len(self.arriving)
        if self._max_waiting is not None and waiting >= self._max_waiting:
            message = f"{waiting} requests are already waiting for their first token; try again later."
            return error_response(429, message, headers=RETRY_AFTER)
        return None
