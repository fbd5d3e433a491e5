"""Limit on the length of request bodies, with and without a Content-Length."""

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.errors import error_response


class BodyLimitMiddleware:
    """Answers 413 to a body of more than `max_bytes`.

    A body with a Content-Length is refused before any of it is read, a chunked one as soon as it is too long.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._message = f"The body of the request is longer than {max_bytes} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses one ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        if announced > self._max_bytes:
            return await error_response(413, self._message)(scope, receive, send)
        received = 0

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # Reaches the handler that reads the body, and there vLLM's error responses.
                raise HTTPException(413, self._message)
            return message

        await self.app(scope, receive_and_count, send)
