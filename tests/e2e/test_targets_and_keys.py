"""Targets of requests and limits of API keys, on simulated engines under load."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.connections import LIMITS
from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import TIMEOUT, assert_at_rest, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

TTFT, ITL = "x-slo-ttft-ms", "x-slo-itl-ms"
PROMPT_TOKENS = 2000


KEYS = "admin rpm=100000\nflood\nother\ntrial name=visitors,rpm=2,tpm=1000  # until May\n"


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    file = logs / "keys"
    file.write_text(KEYS)
    file.chmod(0o600)
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "1", "--slo", "itl=5")
    flags += ("--fair-share", "--api-key-file", str(file), "--key-limits", "rpm=1000")
    with run_cluster(logs / "targets.log", *flags) as server:
        yield server


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[CompletionClient]:
    """With a key that is hardly limited; the cluster has to be at rest when the test has ended."""
    headers = key("admin")
    async with httpx.AsyncClient(
        base_url=server.url, timeout=TIMEOUT, limits=LIMITS, headers=headers
    ) as http:
        client = CompletionClient(http)
        yield client
        await assert_at_rest(client)


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


def waiting(cluster: dict[str, Any]) -> int:
    """Requests without a first token: in line, and in the instances' own queues."""
    return int(cluster["waiting_line"]["requests"] + sum(i["waiting"] for i in cluster["instances"]))


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
    await client.until(lambda cluster: waiting(cluster) >= 8)

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
    await client.until(lambda cluster: bool(cluster["targets"]["requests"] >= 13))
    targets = (await client.http.get("/cluster")).json()["targets"]
    assert targets["attainment"] == round(targets["met"] / targets["requests"], 4) > 0


@pytest.mark.parametrize("value", ["nan", "-1", "soon", "1e40"])
async def test_a_target_that_is_nonsense_is_bad_input(client: CompletionClient, value: str) -> None:
    refused = await ask(client.http, {ITL: value}, stream=True)

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)


async def test_a_key_that_floods_the_queue_does_not_delay_another_one(client: CompletionClient) -> None:
    """A dozen prompts of one key wait. Two of another key, which come last, are among the first to start."""
    http = client.http
    flood = [asyncio.create_task(first_token_at(http, 100 + n, key("flood"))) for n in range(12)]
    await client.until(lambda cluster: bool(cluster["waiting_line"]["requests"] >= 6))
    other = [asyncio.create_task(first_token_at(http, 200 + n, key("other"))) for n in range(2)]

    times = await asyncio.gather(*flood)
    late = sorted(await asyncio.gather(*other))

    assert sum(at < late[-1] for at in times) <= 9, "the flood has gone first"
    assert sum(at < late[0] for at in times) <= 7


async def test_a_key_has_limits_of_its_own(client: CompletionClient) -> None:
    http = client.http
    first = await ask(http, key("trial"))
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    too_many = await ask(http, key("trial"), n=2, stream=True)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(too_many.headers["Retry-After"]) <= 30
    long = {"prompt": token_ids(950), "max_tokens": 2}
    assert (await ask(http, key("trial"), **long)).json()["error"]["message"].startswith("The limit of 1000")
    assert (await ask(http, key("trial"))).status_code == 200
    assert (await ask(http, key("other"))).status_code == 200
    assert (await ask(http, key("stranger"))).status_code == 401


async def test_metrics_name_keys_but_do_not_show_them(client: CompletionClient) -> None:
    await ask(client.http, key("trial"))  # perhaps refused: it is counted in any case

    shown = (await client.http.get("/metrics")).text

    assert not [line for line in shown.splitlines() if line.startswith("pd_serve_") and "NaN" in line]
    lines = [line for line in shown.splitlines() if line.startswith("pd_serve_key_")]
    names = {line.partition('key="')[2].partition('"')[0] for line in lines}
    hashes = {hashlib.sha256(name.encode()).hexdigest()[:8] for name in ("admin", "flood", "other")}
    assert names == {"visitors", *hashes}
    of_trial = {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "visitors" in line
    }
    assert of_trial["pd_serve_key_requests_total"] + of_trial["pd_serve_key_refused_requests_total"] >= 1
