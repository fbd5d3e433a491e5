"""openai-python, unchanged: what it makes of the cluster is what it makes of plain vLLM."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.openai_session import CALLS, SETTINGS, WRONG, asynchronous, typed_error
from tests.e2e.server_process import ServerProcess
from tests.e2e.verdicts import Verdicts

SUITE = "openai-python"
OPTIONS: Any = {"api_key": "none", "max_retries": 0, "timeout": 120.0}

Both = tuple[OpenAI, OpenAI]


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


@pytest.fixture
def both(server: ServerProcess, reference: Reference, verdicts: Verdicts) -> Iterator[Both]:
    """Clients of plain vLLM and of the cluster."""
    verdicts.tried(SUITE, openai.__version__)
    with (
        OpenAI(base_url=f"{reference.url}/v1", **OPTIONS) as theirs,
        OpenAI(base_url=f"{server.url}/v1", **OPTIONS) as ours,
    ):
        yield theirs, ours


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_has_plain_vllms_answer_across_a_hand_off(
    client: CompletionClient, both: Both, verdicts: Verdicts, name: str
) -> None:
    """Every answer crosses a hand-off."""
    theirs, ours = both
    named = ours.with_options(default_headers={"X-Request-Id": f"call-{name}"})
    verdicts.compare(SUITE, name, CALLS[name](theirs), await asyncio.to_thread(CALLS[name], named))
    if name != "models":
        assert len(await client.handed_off(f"call-{name}")) == 1


@pytest.mark.parametrize("name", WRONG)
def test_an_error_has_the_same_type_as_plain_vllms(both: Both, verdicts: Verdicts, name: str) -> None:
    theirs, ours = (typed_error(client, WRONG[name]) for client in both)
    verdicts.compare(SUITE, f"error: {name}", theirs, ours)


async def test_concurrent_streams_have_plain_vllms_answers(
    client: CompletionClient, reference: Reference, verdicts: Verdicts
) -> None:
    async with (
        AsyncOpenAI(base_url=f"{reference.url}/v1", **OPTIONS) as theirs,
        AsyncOpenAI(base_url=f"{client.http.base_url}/v1", **OPTIONS) as ours,
    ):
        expected = [await asynchronous(theirs, number) for number in range(8)]  # alone: batches may round
        answers = await asyncio.gather(*(asynchronous(ours, number) for number in range(8)))
    verdicts.compare(SUITE, "8 streams of AsyncOpenAI", expected, answers)


LONG: Any = {
    **SETTINGS,
    "prompt": "x",
    "max_tokens": 6000,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: None], ids=["close", "drop"])
async def test_leaving_a_stream_ends_its_request(
    client: CompletionClient, leave: Callable[[Any], None]
) -> None:
    """`client` sees to it that every block is free again."""
    with OpenAI(base_url=f"{client.http.base_url}/v1", **OPTIONS) as ours:
        stream = ours.completions.create(**LONG)
        for _ in range(20):
            assert next(stream).choices[0].finish_reason is None
        leave(stream)


async def test_leaving_an_asynchronous_stream_ends_its_request(client: CompletionClient) -> None:
    async with AsyncOpenAI(base_url=f"{client.http.base_url}/v1", **OPTIONS) as ours:
        async with await ours.completions.create(**LONG) as stream:
            async for _ in stream:
                break
        left: Any = LONG | {"stream": False, "extra_headers": {"X-Request-Id": "left"}}
        task = asyncio.create_task(ours.completions.create(**left))
        async with asyncio.timeout(
            60
        ):  # httpx loses the socket of a request that is cancelled as it connects
            while (await client.http.get("/cluster/requests/left")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
