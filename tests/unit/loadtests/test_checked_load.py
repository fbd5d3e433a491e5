"""Checked streams, at a server with faults in single streams."""

import asyncio
from collections.abc import Iterator

import pytest

from loadtests import checked_load
from loadtests.checked_load import CheckedLoad, StreamRecord, planned
from loadtests.stream_client import AsyncStreamClient
from tests.integration.fake_model_server import Chunks, FakeModelServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelServer]:
    monkeypatch.setattr(checked_load, "FAILURE_PAUSE_S", 0.0)
    with FakeModelServer().running() as server:
        yield server


async def streams(server: FakeModelServer, count: int) -> list[StreamRecord]:
    """The records of at least so many streams of one client, by number."""
    async with AsyncStreamClient(server.url) as client:
        load = CheckedLoad(client, seed=3, num_clients=1, num_references=4)
        await load.take_references()
        load.start()
        while len(load.records) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await load.stop(30.0) == 0
        assert load.active == {}
        assert len(load.failed()) == sum(record.outcome.error is not None for record in load.records)
        return load.records


def lose_a_token(chunks: Chunks) -> None:
    del chunks[10]


def repeat_a_token(chunks: Chunks) -> None:
    chunks.insert(10, chunks[9])


def change_a_token(chunks: Chunks) -> None:
    chunks[10]["choices"][0]["token_ids"] = [1]


def cut(chunks: Chunks) -> None:
    chunks[10:] = [{"cut": True}]


def change_and_cut(chunks: Chunks) -> None:
    change_a_token(chunks)
    chunks[12:] = [{"cut": True}]


async def test_right_streams_have_no_error(server: FakeModelServer) -> None:
    records = await streams(server, 5)

    assert [record.outcome.number for record in records] == list(range(len(records)))
    assert all(record.outcome.error is None and not record.broken for record in records)
    assert all(record.outcome.tokens >= 64 for record in records)


async def test_every_fault_is_named(server: FakeModelServer) -> None:
    server.faults = {
        0: lose_a_token,
        1: repeat_a_token,
        2: change_a_token,
        3: cut,
        4: change_and_cut,
        5: None,
    }
    server.busy = {6: 2}

    records = await streams(server, 7)

    assert [record.outcome.error for record in records[:7]] == [
        "a token is lost",
        "a token is repeated",
        "a token is wrong",
        "connection failed: ClientPayloadError",
        "tokens are wrong before the connection broke",
        "HTTP 503",
        None,
    ]
    assert [record.broken for record in records[:7]] == [False, False, False, True, False, False, False]
    assert records[6].refusals == 2


def test_requests_are_drawn_from_the_seed_and_fit_the_model() -> None:
    requests = planned(1, 20, 400)

    assert requests == planned(1, 20, 400)
    assert requests != planned(2, 20, 400)
    assert {request.api for request in requests} == {"chat", "completions"}
    assert {request.priority for request in requests} == {-1, 0}
    assert max(request.prompt_tokens + request.output_tokens for request in requests) <= 400


async def test_clients_end_at_once_when_asked(server: FakeModelServer) -> None:
    async with AsyncStreamClient(server.url) as client:
        load = CheckedLoad(client, seed=3, num_clients=3, num_references=2)
        await load.take_references()
        load.start(apart_s=0.0)

        await load.close()
        ended = len(load.records)
        await asyncio.sleep(0.1)

        assert len(load.records) == ended
        assert load.active == {}
