"""The headers of the HTTP request of a task: the client's own id of the request, credentials, targets."""

from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pd_serve.api.errors import error_response

#: The client's own id of a request. Every message about the request, every report of its instance twice a
#: second, and every chunk of its stream has it.
HEADER, MAX_ID_CHARS = "X-Request-Id", 1000

#: Name of the session that a request is a turn of. Longer names are ignored.
SESSION_HEADER, MAX_SESSION_CHARS = "X-Session-ID", 256

_headers: ContextVar[Headers | None] = ContextVar("pd_serve_headers", default=None)


def header_values(name: str) -> list[str]:
    """All values of a header of the HTTP request of this task."""
    headers = _headers.get()
    return [] if headers is None else headers.getlist(name)


def client_id() -> str:
    """The `X-Request-Id` of the HTTP request of this task; "" without one."""
    return next(iter(header_values(HEADER)), "")


def session_id() -> str:
    """The `X-Session-ID` of the HTTP request of this task; "" without one."""
    name = next(iter(header_values(SESSION_HEADER)), "")
    return name if len(name) <= MAX_SESSION_CHARS else ""


def credentials() -> str:
    """The `Authorization` of the HTTP request of this task; "" without one."""
    return next(iter(header_values("Authorization")), "")


class IdentityMiddleware:
    """Keeps the headers for the tasks of a request. Some of vLLM's routes make an id of their own.

    An id that is too long is answered with 400.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        token = _headers.set(Headers(scope=scope))
        try:
            if len(client_id()) > MAX_ID_CHARS // 2:  # vLLM puts something around it
                why = f"{HEADER} has {len(client_id())} characters, and may have {MAX_ID_CHARS // 2}."
                return await error_response(400, why, param=HEADER)(scope, receive, send)
            await self.app(scope, receive, send)
        finally:
            _headers.reset(token)
