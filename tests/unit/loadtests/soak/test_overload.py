"""Overload, in small, at a server that keeps its order."""

from collections.abc import Iterator

import pytest

from loadtests.soak import overload
from loadtests.soak.overload import Overload
from loadtests.stream_client import AsyncStreamClient
from tests.integration.fake_model_server import FakeModelServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelServer]:
    for name, value in {"STREAMS": 20, "CONNECTIONS": 30, "PROMPTS": 3, "SLOW_READERS": 2}.items():
        monkeypatch.setattr(overload, name, value)
    for name in ("SLOW_S", "HELD_S", "PROBE_PAUSE_S"):
        monkeypatch.setattr(overload, name, 0.1)
    with FakeModelServer().running() as server:
        yield server


async def test_every_case_is_tried_beside_probes(server: FakeModelServer) -> None:
    async with AsyncStreamClient(server.url) as client:
        one = Overload(client, server.url, seed=1)
        await one.run()

    # The fake server does not take several prompts.
    assert [problem for problem in one.problems if "3 prompts" not in problem] == []
    assert list(one.numbers) == [
        "20 streams",
        "2 slow readers",
        "30 connections",
        "3 prompts in one request",
    ]
    assert one.numbers["20 streams"]["probes"] >= 1
    assert len([body for body in server.bodies if body["max_tokens"] == overload.SLOW_TOKENS]) == 2
