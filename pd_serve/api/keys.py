"""Who may use the API: its keys, and the one for `/cluster`.

vLLM's own check guards only some path prefixes (/v1, /v2, /inference, /cohere). Behind it this one guards all
paths but those that are open by design.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

ADMIN_PREFIX = "/cluster"

#: What probes and monitors ask, and pages without data of their own: /dashboard gets its from /cluster.
OPEN_PREFIXES = (
    "/health",
    "/ping",
    "/load",
    "/version",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/dashboard",
)


class KeyMiddleware:
    """Answers 401, in vLLM's words, to whoever has no key for a path.

    Args:
        api_keys: Each opens all paths, `/cluster` only if that has no key of its own. None at all: no key is
            needed.
        admin_key: Opens `/cluster` and nothing else.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], admin_key: str | None) -> None:
        self.app = app
        # For their comparison in constant time, of hashes.
        self._api = AuthenticationMiddleware(app, list(api_keys)) if api_keys else None
        self._admin = self._api if admin_key is None else AuthenticationMiddleware(app, [admin_key])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection, or refuse it."""
        app = self.app
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            lock = self._lock(path)
            if lock is not None and not lock.verify_token(Headers(scope=scope)):
                headers = {"WWW-Authenticate": "Bearer"}
                app = JSONResponse({"error": "Unauthorized"}, status_code=401, headers=headers)
        await app(scope, receive, send)

    def _lock(self, path: str) -> AuthenticationMiddleware | None:
        if _is_below(path, ADMIN_PREFIX):
            return self._admin
        return None if any(_is_below(path, prefix) for prefix in OPEN_PREFIXES) else self._api


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")
