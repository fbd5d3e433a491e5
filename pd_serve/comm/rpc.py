"""Remote calls over one-way messages: typed requests, a timeout, and errors that keep their class."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar, get_args
from uuid import uuid4

import msgspec

from migration.tasks import BackgroundTasks
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.timing import CALL_TIMEOUT_S
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    PdServeError,
    RefusalCode,
    UnknownTargetError,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

#: Maximum number of served call ids that are kept, to notice a second delivery.
MAX_SERVED = 1000

#: Errors that the caller gets with their class. It gets others as `EngineDeadError`.
ERRORS: dict[str, type[PdServeError]] = {
    kind.__name__: kind
    for kind in (PdServeError, InvalidRequestError, UnknownTargetError, MigrationRefusedError)
}


class Request(msgspec.Struct, Generic[R], frozen=True, tag=True):
    """Base of all requests. The type parameter is the type of the result."""

    @classmethod
    def result_type(cls) -> Any:
        return get_args(cls.__orig_bases__[0])[0]  # type: ignore[attr-defined]


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Answer to a call: the result, or an error with the name of its class and its refusal code."""

    call_id: str
    result: Any = None
    error: str | None = None
    error_class: str = ""
    code: RefusalCode | None = None

    @classmethod
    def of(cls, call_id: str, error: PdServeError) -> "Answer":
        """The answer that makes `RpcClient.call` raise this error."""
        return cls(call_id, None, str(error), type(error).__name__, getattr(error, "code", None))

    def raised(self) -> PdServeError:
        """The error that `RpcClient.call` raises, of the same class."""
        kind, text = ERRORS.get(self.error_class, EngineDeadError), self.error or ""
        return kind(text, self.code) if issubclass(kind, MigrationRefusedError) else kind(text)


class RpcClient:
    """The calling side. Used on one event loop.

    Args:
        make_call: Wraps a call id and a request in the message to send; see `pd_serve.comm.requests.Call`.
    """

    def __init__(self, wire: MessageWire, make_call: Callable[[str, Any], object]) -> None:
        self._wire = wire
        self._make_call = make_call
        self._waiting: dict[str, tuple[str, asyncio.Future[Any]]] = {}

    async def call(self, peer: str, request: Request[R]) -> R:
        """Sends a request and waits for its answer.

        Raises:
            EngineDeadError: The peer is not connected, or died before it answered.
            TimeoutError: No answer within `CALL_TIMEOUT_S`.
            PdServeError: The peer answered with this error.
        """
        call_id = uuid4().hex  # an answer may be on its way to an earlier process of this name
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = (peer, future)
        try:
            if not self._wire.send(peer, self._make_call(call_id, request)):
                raise EngineDeadError(f"{peer} is not connected")
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result: R = msgspec.convert(await future, request.result_type())
                return result
        finally:
            del self._waiting[call_id]

    def on_answer(self, sender: str, answer: Answer) -> None:
        """Receives an answer. One to a call that has ended, or to a call of another peer, is ignored."""
        peer, future = self._waiting.get(answer.call_id, ("", None))
        if future is None or future.done() or sender != peer:
            return
        if answer.error is None:
            future.set_result(answer.result)
        else:
            future.set_exception(answer.raised())

    def peer_lost(self, peer: str) -> None:
        """Fails all calls to a peer that has died."""
        for called, future in self._waiting.values():
            if called == peer and not future.done():
                future.set_exception(EngineDeadError(f"{peer} has died"))


class RpcServer:
    """The answering side.

    Args:
        handlers: A coroutine function of (sender, request) for each type of request.
    """

    def __init__(
        self, wire: MessageWire, handlers: Mapping[type, Callable[[str, Any], Awaitable[Any]]]
    ) -> None:
        self._wire = wire
        self._handlers = dict(handlers)
        self._served: OrderedDict[str, None] = OrderedDict()
        self._tasks = BackgroundTasks(wire.failures.task_failed)

    async def close(self) -> None:
        await self._tasks.cancel()

    def serve(self, request: type, handler: Callable[[str, Any], Awaitable[Any]]) -> None:
        """Adds a handler for another type of request."""
        self._handlers[request] = handler

    def on_call(self, sender: str, call_id: str, request: Any) -> None:
        """Serves a call. One that comes a second time is ignored."""
        if call_id in self._served:
            return
        self._served[call_id] = None
        if len(self._served) > MAX_SERVED:
            self._served.popitem(last=False)
        self._tasks.start(self._answer(sender, call_id, request))

    async def _answer(self, sender: str, call_id: str, request: Any) -> None:
        handler = self._handlers.get(type(request))
        try:
            if handler is None:
                raise InvalidRequestError(f"{self._wire.name} does not serve {type(request).__name__}")
            answer = Answer(call_id, await handler(sender, request))
        except PdServeError as error:
            answer = Answer.of(call_id, error)
        except TimeoutError:
            answer = Answer(call_id, None, "no answer in time", EngineDeadError.__name__)
        except Exception as error:
            self._wire.failures.record(f"serving {type(request).__name__} to {sender}", error, "call")
            answer = Answer(call_id, None, f"{type(error).__name__}: {error}", EngineDeadError.__name__)
        try:
            self._wire.send(sender, answer)
        except TypeError as error:  # the result cannot be encoded
            self._wire.failures.record(f"answering {type(request).__name__} of {sender}", error, "call")
            self._wire.send(sender, Answer(call_id, None, f"{error}", EngineDeadError.__name__))
