"""Overload protection: requests are refused before they are tokenized, or at least before they are queued.

The unit is the engines' request: a prompt, or one of its `n` choices. An HTTP request is *arriving* from the
moment its body is complete until the engine client has passed all that it brings to the cluster, which counts
them as waiting from then on. Both count towards the limit: in a burst, all requests are still arriving when
the last one is checked.
"""

from collections.abc import Callable
from contextvars import ContextVar

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.errors import error_response
from pd_serve.errors import InvalidRequestError, OverloadedError, RequestRefusedError
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

#: Paths whose errors have another format than OpenAI's: a refusal there is vLLM's own answer.
OTHER_FORMATS = frozenset({"/cohere/v2/chat", "/v1/messages"})

#: Reason of refusals without a code, in the metric, by status.
REASONS = {429: "overloaded", 503: "no_instance"}

#: Header of refusals, in seconds.
RETRY_AFTER = {"Retry-After": "1"}


class Arrival:
    """One HTTP request on its way to the cluster.

    Args:
        arriving: Has it while the cluster does not count all requests that it brings.
        check: Called with their number when that is more than one. Raises: see `announce`.

    Attributes:
        num_requests: Requests that it brings and the cluster does not count yet; one until they are known.
        num_tokens: Tokens of their prompts, as far as they are known.
        refusal: Why the cluster has refused one of them.
        headers: Of its answer, in addition to others.
        charges: Callbacks that give back what its account was charged; called if it is refused as a whole.
        charged: Requests and tokens that its account was charged for.
        admitted: Ids of its requests that were admitted before they are submitted.
    """

    def __init__(self, arriving: "set[Arrival]", check: Callable[[int], None]) -> None:
        self.num_requests = self.num_tokens = 0
        self.refusal: RequestRefusedError | None = None
        self.headers: dict[str, str] = {}
        self.charges: list[Callable[[], None]] = []
        self.charged = (0, 0)
        self.admitted: set[str] = set()
        self._arriving = arriving
        self._check = check
        self._is_announced = self._has_ended = False

    def begin(self) -> None:
        """Counts it as one request from now on: its body is complete."""
        self._count(1)

    def announce(self, number: int) -> None:
        """Counts `number` requests that it brings; at a later call, `number` more."""
        self._count(number + (self.num_requests if self._is_announced else 0))
        self._is_announced = True
        if self.num_requests > 1:
            self._check(self.num_requests)

    def submitted(self, number: int, tokens: int) -> None:
        """Counts `number` of them no more: the cluster does from now on, or has refused them."""
        self.num_tokens = max(self.num_tokens - tokens, 0)
        self._count(max(self.num_requests - number, 0))

    @property
    def tokens_of_all(self) -> int:
        """Tokens of all HTTP requests on their way."""
        return sum(arrival.num_tokens for arrival in self._arriving)

    def end(self) -> None:
        """Counts nothing of it any more, even if a task that it has started goes on."""
        self._count(0)
        self._has_ended = True

    def _count(self, number: int) -> None:
        if self._has_ended:
            return
        self.num_requests = number
        (self._arriving.add if number else self._arriving.discard)(self)


_arrival: ContextVar[Arrival | None] = ContextVar("pd_serve_arrival", default=None)
"""Of the HTTP request of this task. Inherited by the tasks that vLLM's handlers start."""


def announce(number: int) -> None:
    """Announces requests that the HTTP request of this task brings, before any of them is submitted.

    Raises:
        InvalidRequestError: It brings more than one HTTP request may.
        OverloadedError: Too many requests wait.
    """
    if (arrival := _arrival.get()) is not None:
        arrival.announce(number)


def announce_tokens(tokens: int) -> None:
    """Announces the prompts of requests that were announced."""
    if (arrival := _arrival.get()) is not None:
        arrival.num_tokens += tokens


def arriving_tokens() -> int:
    """Prompt tokens that were announced by any task, and that the cluster does not count yet."""
    return arrival.tokens_of_all if (arrival := _arrival.get()) is not None else 0


def mark_submitted(number: int = 1, tokens: int = 0) -> None:
    """Marks requests of this task as passed to the cluster, or refused.

    Args:
        tokens: Of all their prompts.
    """
    if (arrival := _arrival.get()) is not None:
        arrival.submitted(number, tokens)


def charged() -> tuple[int, int]:
    """Requests and tokens that the HTTP request of this task was charged for."""
    return arrival.charged if (arrival := _arrival.get()) is not None else (0, 0)


def note_charge(give_back: Callable[[], None], requests: int, tokens: int) -> None:
    """Keeps what the account of this task was charged, so that `give_charges_back` can undo it."""
    if (arrival := _arrival.get()) is not None:
        arrival.charges.append(give_back)
        arrival.charged = (arrival.charged[0] + requests, arrival.charged[1] + tokens)


def note_headers(headers: dict[str, str]) -> None:
    """Adds headers to the answer of the HTTP request of this task."""
    if (arrival := _arrival.get()) is not None:
        arrival.headers = headers


def give_charges_back() -> None:
    """Undoes all charges of the HTTP request of this task, which is refused as a whole."""
    if (arrival := _arrival.get()) is not None:
        while arrival.charges:
            arrival.charges.pop()()
        arrival.charged = (0, 0)


def note_admitted(request_id: str) -> None:
    """Keeps that a request of this task was admitted before vLLM submits it."""
    if (arrival := _arrival.get()) is not None:
        arrival.admitted.add(request_id)


def was_admitted(request_id: str) -> bool:
    """Whether a request of this task was admitted before."""
    return (arrival := _arrival.get()) is not None and request_id in arrival.admitted


def note_refusal(refusal: RequestRefusedError) -> None:
    """Keeps the refusal of a request of this task: the answer of its HTTP request, unless that has begun."""
    if (arrival := _arrival.get()) is not None:
        arrival.refusal = refusal


class OverloadMiddleware:
    """Answers 503 while no instance takes requests or is about to, and 429 while too many requests wait.

    An HTTP request that brings several requests (prompts, choices) may take half of the places, so that such
    requests never take them all: then it gets 429, and 400 if it alone brings more.

    Whether a request may wait is asked twice: before its body is read, and when the body is complete.

    Pure ASGI: streams and the detection of disconnected clients work as without it. Refusals by the cluster
    and by vLLM (`--max-num-queued-reqs`) get their `Retry-After` here too.

    Args:
        cluster: Asked for `takes_requests`, `num_waiting` and `num_waiting_elsewhere` on every generating
            request.
        max_waiting: Requests that may wait for their first token, at all API servers; None for no limit.
        on_429: Called in the task of each request that gets 429.

    Attributes:
        arriving: HTTP requests whose body is complete and which bring requests that the cluster does not
            count yet.
        is_closed: Answers 503 to all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        cluster: ClusterView,
        max_waiting: int | None = None,
        on_429: Callable[[], None] = lambda: None,
    ) -> None:
        self.app = app
        self.arriving: set[Arrival] = set()
        self.is_closed = False
        self._cluster = cluster
        self._max_waiting = max_waiting
        self._on_429 = on_429

    @property
    def num_waiting(self) -> int:
        """Requests of this API server that wait for their first token, arriving ones included."""
        return self._cluster.num_waiting + sum(arrival.num_requests for arrival in self.arriving)

    @property
    def _num_waiting_in_all(self) -> int:
        return self.num_waiting + self._cluster.num_waiting_elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in GENERATING_PATHS:
            return await self.app(scope, receive, send)
        refusal = self._refusal()
        if refusal is not None:
            self._count(refusal.status_code, None)
            return await refusal(scope, receive, send)

        arrival = Arrival(self.arriving, self._check_several)

        async def receive_and_count() -> Message:
            message = await receive()
            # Not earlier: a slow upload must not count towards the limit.
            if message["type"] == "http.request" and not message.get("more_body", False):
                if (why := self._overload()) is not None:  # others have arrived meanwhile
                    # Reaches the handler that reads the body, and there vLLM's error responses.
                    raise HTTPException(429, why)
                arrival.begin()
            return message

        is_replaced = False

        async def send_with_hint(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                why = arrival.refusal if message["status"] == 429 else None
                self._count(message["status"], why)
                hint = RETRY_AFTER if why is None else {"Retry-After": str(why.retry_after_s)}
                if why is not None and path not in OTHER_FORMATS:
                    is_replaced = True
                    answer = error_response(429, str(why), code=why.code, headers=hint | arrival.headers)
                    return await answer(scope, receive, send)
                MutableHeaders(scope=message).setdefault("Retry-After", hint["Retry-After"])
            if message["type"] == "http.response.start" and arrival.headers:
                MutableHeaders(scope=message).update(arrival.headers)
            if not is_replaced:
                await send(message)

        token = _arrival.set(arrival)
        try:
            await self.app(scope, receive_and_count, send_with_hint)
        finally:
            arrival.end()
            _arrival.reset(token)

    def _refusal(self) -> JSONResponse | None:
        if self.is_closed or not self._cluster.takes_requests:
            return error_response(503, "No instance is available.", headers=RETRY_AFTER)
        if (why := self._overload()) is not None:
            return error_response(429, why, headers=RETRY_AFTER)
        return None

    def _overload(self) -> str | None:
        """Why a request cannot wait, in words; None if it can."""
        waiting = self._num_waiting_in_all
        if self._max_waiting is None or waiting < self._max_waiting:
            return None
        return f"{waiting} requests are already waiting for their first token; try again later."

    def _count(self, status: int, why: RequestRefusedError | None) -> None:
        """Counts a refusal by its reason; without a code, the status has one."""
        REFUSED_REQUESTS.labels(str(status), REASONS[status] if why is None else why.code).inc()
        if status == 429:
            self._on_429()

    def _check_several(self, number: int) -> None:
        if self._max_waiting is None:
            return
        places = max(self._max_waiting // 2, 1)
        if number > places:
            raise InvalidRequestError(
                f"The request brings {number} prompts or choices, and one request may bring {places}:"
                " send several smaller ones (or raise --max-waiting-requests, of which it may be half)."
            )
        if (waiting := self._num_waiting_in_all) > places:
            raise OverloadedError(
                f"{waiting - number} requests are already waiting for their first token, and this one brings"
                f" {number} at once; try again later."
            )
