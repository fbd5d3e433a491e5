"""API keys, and the admin key for `/cluster`.

vLLM's own check covers only some path prefixes (/v1, /v2, /inference, /cohere). This one covers all paths
except `OPEN_PREFIXES`.
"""

import hashlib
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from pd_serve.api.identity import credentials

ADMIN_PREFIX = "/cluster"

#: Paths for probes and monitoring, and pages without data: /dashboard reads its data from /cluster.
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


class KeyAccounts:
    """The accounts of the API keys: their numbers, so that no key is passed on."""

    def __init__(self, api_keys: Sequence[str]) -> None:
        self._numbers = {_digest(key): number for number, key in enumerate(api_keys)}

    def current(self) -> int:
        """The account of the HTTP request of this task, whose key was checked; 0 without keys."""
        return self._numbers.get(_digest(credentials().partition(" ")[2]), 0)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class KeyMiddleware:
    """Answers 401, with vLLM's body, to requests without a valid key.

    Args:
        api_keys: Valid for all paths, and for `/cluster` if there is no admin key. Empty: no key is required.
        admin_key: Valid for `/cluster` only.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], admin_key: str | None) -> None:
        self.app = app
        # vLLM compares hashes, in constant time.
        self._api = AuthenticationMiddleware(app, list(api_keys)) if api_keys else None
        self._admin = self._api if admin_key is None else AuthenticationMiddleware(app, [admin_key])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses one ASGI connection."""
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
