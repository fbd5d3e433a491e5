"""The client's own id of a request, which is its name on all routes."""

from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "X-Request-Id"

_client_id: ContextVar[str] = ContextVar("pd_serve_client_id", default="")
_credentials: ContextVar[str] = ContextVar("pd_serve_credentials", default="")


def client_id() -> str:
    """The `X-Request-Id` of the HTTP request of this task; "" without one."""
    return _client_id.get()


def credentials() -> str:
    """The `Authorization` of the HTTP request of this task; "" without one."""
    return _credentials.get()


class IdentityMiddleware:
    """Keeps the client's `X-Request-Id` for `client_id`. Some of vLLM's routes make an id of their own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        token = _client_id.set(headers.get(HEADER, ""))
        other = _credentials.set(headers.get("Authorization", ""))
        try:
            await self.app(scope, receive, send)
        finally:
            _client_id.reset(token)
            _credentials.reset(other)
