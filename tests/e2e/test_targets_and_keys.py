"""Targets of requests and limits of API keys, on simulated engines under load."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

TTFT, ITL = "x-slo-ttft-ms", "x-slo-itl-ms"
PROMPT_TOKENS = 2000


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "1")
    with run_cluster(logs / "targets.log", *flags, "--slo", "itl=5") as server:
        yield server


async def first_token_at(http: httpx.AsyncClient, seed: int, headers: dict[str, str] | None = None) -> float:
    """Sends a request. Returns when its first token came."""
    body = {"model": "tiny", "prompt": token_ids(PROMPT_TOKENS, seed), "max_tokens": 2, "stream": True}
    at = 0.0
    async with http.stream("POST", "/v1/completions", json=body, headers=headers or {}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and not at:
                at = time.monotonic()
    assert at
    return at


async def ask(http: httpx.AsyncClient, headers: dict[str, str], **body: Any) -> httpx.Response:
    asked = {"model": "tiny", "prompt": token_ids(100), "max_tokens": 2}
    return await http.post("/v1/completions", json=asked | body, headers=headers)


async def test_nothing_is_refused_before_anything_is_measured(client: CompletionClient) -> None:
    assert (await ask(client.http, {TTFT: "0.001"})).status_code == 200


async def test_deadlines_order_the_queue_and_what_cannot_be_met_is_refused(client: CompletionClient) -> None:
    """A dozen prompts wait on the prefill instance. One with a deadline passes them, and one that could not
    be computed in time even so is refused at once, while a dozen wait."""
    http = client.http
    await first_token_at(http, 99)
    before = await client.metric("pd_serve_slo_requests_total")
    refused_before = await client.metric("pd_serve_refused_requests_total")
    crowd = [asyncio.create_task(first_token_at(http, seed)) for seed in range(12)]
    await client.until(lambda cluster: sum(i["waiting"] for i in cluster["instances"]) >= 8)

    urgent = asyncio.create_task(first_token_at(http, 50, {TTFT: "3000"}))
    refused = await ask(http, {TTFT: "0.01"})
    waits = sum(not one.done() for one in crowd)

    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "slo_unattainable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert waits >= 6
    order = sorted([*await asyncio.gather(*crowd), await urgent])
    assert order.index(await urgent) < 8
    await client.until(lambda cluster: all(i["running"] == 0 for i in cluster["instances"]))
    # All but the refused one have the target of the service, and no token takes five seconds.
    assert await client.metric("pd_serve_slo_requests_total") == before + 13
    assert await client.metric("pd_serve_refused_requests_total") == refused_before + 1


@pytest.mark.parametrize("value", ["nan", "-1", "soon", "1e40"])
async def test_a_target_that_is_nonsense_is_bad_input(client: CompletionClient, value: str) -> None:
    refused = await ask(client.http, {ITL: value}, stream=True)

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
