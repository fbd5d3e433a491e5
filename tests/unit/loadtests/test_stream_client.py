"""The HTTP client on asyncio, at a real server."""

from collections.abc import Iterator

import pytest

from loadtests import stream_client
from loadtests.answer import StreamedAnswer, StreamError
from loadtests.servers import free_port
from loadtests.stream_client import AsyncStreamClient, RefusedError
from tests.integration.fake_model_server import Chunks, FakeModelServer

BODY = {"prompt": [100, 101], "max_tokens": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeModelServer]:
    with FakeModelServer().running() as server:
        yield server


def named(number: int) -> dict[str, str]:
    return {"X-Request-Id": f"test-{number}"}


async def test_a_stream_is_read_to_its_end(server: FakeModelServer) -> None:
    answer = StreamedAnswer()
    async with AsyncStreamClient(server.url) as client:
        await client.stream("completions", BODY, answer)

    assert answer.done
    assert len(answer.token_ids) == len(answer.times_s) == 20
    assert answer.usage == {"prompt_tokens": 2, "completion_tokens": 20}


async def test_json_is_read_and_sent(server: FakeModelServer) -> None:
    async with AsyncStreamClient(server.url, api_key="sk-x") as client:
        assert (await client.json("/v1/models"))["data"][0]["id"] == "fake"
        assert (await client.json("/detokenize", {"tokens": [97]})) == {"prompt": "a"}
        with pytest.raises(StreamError, match="HTTP 404"):
            await client.json("/nothing")


async def test_a_refusal_names_its_time(server: FakeModelServer) -> None:
    server.busy[1] = 1
    async with AsyncStreamClient(server.url) as client:
        with pytest.raises(RefusedError) as refused:
            await client.stream("completions", BODY, StreamedAnswer(), named(1))

    assert (refused.value.kind, refused.value.retry_after_s) == ("HTTP 503", 0.0)


async def test_a_patient_client_comes_back(server: FakeModelServer) -> None:
    server.busy[2] = 3
    answer = StreamedAnswer()
    async with AsyncStreamClient(server.url) as client:
        refusals = await client.stream_patiently("completions", BODY, answer, named(2))

    assert (refusals, len(answer.token_ids)) == (3, 20)


async def test_patience_has_an_end(server: FakeModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_client, "MAX_REFUSED_S", 0.0)
    server.busy[3] = 1000
    async with AsyncStreamClient(server.url) as client:
        with pytest.raises(RefusedError):
            await client.stream_patiently("completions", BODY, StreamedAnswer(), named(3))


async def test_a_refusal_without_a_time_is_a_failure(server: FakeModelServer) -> None:
    server.faults[4] = None
    async with AsyncStreamClient(server.url) as client:
        with pytest.raises(StreamError, match="HTTP 503") as failure:
            await client.stream_patiently("completions", BODY, StreamedAnswer(), named(4))

    assert not isinstance(failure.value, RefusedError)


def cut(chunks: Chunks) -> None:
    chunks[5:] = [{"cut": True}]


async def test_a_broken_connection_is_named(server: FakeModelServer) -> None:
    server.faults[5] = cut
    answer = StreamedAnswer()
    async with AsyncStreamClient(server.url) as client:
        with pytest.raises(StreamError, match="connection failed"):
            await client.stream("completions", BODY, answer, named(5))

    assert len(answer.token_ids) == 5


async def test_a_server_that_is_gone_is_named() -> None:
    async with AsyncStreamClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(StreamError, match="connection failed"):
            await client.json("/cluster")
        with pytest.raises(StreamError, match="connection failed"):
            await client.stream("completions", BODY, StreamedAnswer())
