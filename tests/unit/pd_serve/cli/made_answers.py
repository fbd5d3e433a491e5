"""A service that answers the same to every request."""

import httpx
import pytest


def answering(monkeypatch: pytest.MonkeyPatch, status: int, body: object) -> list[httpx.Request]:
    """All services answer so. Returns what they are sent."""
    sent: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(status, json=body)

    client = httpx.Client
    monkeypatch.setattr(
        httpx, "Client", lambda **options: client(transport=httpx.MockTransport(respond), **options)
    )
    return sent
