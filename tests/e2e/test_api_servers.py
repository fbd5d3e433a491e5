"""Several API servers of `pd-serve serve`: one port, one service; the death of one costs its own streams."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import TIMEOUT, assert_at_rest, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import Stream, answers, streaming
from tests.e2e.test_same_output import assert_same

#: A new API server is a process that imports vLLM, after the pause for one that died early.
START_S = 120.0

MAX_WAITING = 8

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 200} for i in range(8)]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "1", "--api-servers", "2")
    limits = ("--max-waiting-requests", str(MAX_WAITING), "--log-format", "json", "--slo", "itl=5")
    with run_cluster(logs / "api_servers.log", *flags, *limits) as server:
        yield server


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[CompletionClient]:
    """Opens a connection for each request, so that both API servers get some."""
    no_reuse = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=no_reuse) as http:
        client = CompletionClient(http)
        await serving(client)
        yield client
        await assert_at_rest(client)


async def serving(client: CompletionClient, without: int = 0) -> dict[str, int]:
    """Waits until two API servers serve. Returns the process id of each.

    Args:
        without: Process id of one that has died.
    """
    async with asyncio.timeout(START_S):
        while True:
            pids = {row["id"]: row["pid"] for row in (await client.cluster())["api_servers"]}
            # One that is a member, and does not answer the others yet, is about to start.
            ready = set(await counted(client, "process_start_time_seconds"))
            if len(pids) == 2 and ready == set(pids) and without not in pids.values():
                return pids
            await asyncio.sleep(0.2)


async def counted(client: CompletionClient, name: str, outcome: str = "") -> dict[str, float]:
    """A metric by API server, from whichever answers; only samples of an outcome, if there are several."""
    text = (await client.http.get("/metrics", params={"name[]": name})).text
    found: dict[str, float] = {}
    for api_server, value in re.findall(rf'api_server="([^"]+)".*{outcome}.* (\S+)$', text, re.MULTILINE):
        found[api_server] = found.get(api_server, 0.0) + float(value)
    return found


@asynccontextmanager
async def streams_at_both(client: CompletionClient) -> AsyncIterator[list[Stream]]:
    """A stream for each body, some at each API server. On a busy machine one may take them all."""
    for _ in range(10):
        async with AsyncExitStack() as stack:
            streams = await stack.enter_async_context(streaming(client, BODIES, 20))
            if all(row["requests"] for row in (await client.cluster())["api_servers"]):
                yield streams
                return
    raise AssertionError("one API server takes all connections")


async def live_event(client: CompletionClient) -> dict[str, Any]:
    """The first event of a live page."""
    async with client.http.stream("GET", "/cluster/live") as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                return dict(json.loads(line.removeprefix("data: ")))
    raise AssertionError("no event")


async def test_both_serve_and_each_speaks_of_both(client: CompletionClient, server: ServerProcess) -> None:
    pids = await serving(client)
    children = {process.pid for process in psutil.Process(server.process.pid).children()}
    assert set(pids.values()) <= children
    before = await counted(client, "pd_serve_requests_total", "length")

    async with streams_at_both(client) as streams:
        for _ in range(10):  # both of them answer
            rows = (await client.cluster())["api_servers"]
            assert sum(row["requests"] for row in rows) == len(BODIES)
        for ours, body in zip(await answers(streams), BODIES, strict=True):
            assert_same(ours, simulated_answer(body))
    met = 0
    async with asyncio.timeout(30):
        while met < len(BODIES):  # each tells the other soon what it has counted
            met = min([(await client.cluster())["targets"]["met"] for _ in range(10)])

    each = [await counted(client, "pd_serve_requests_total", "length") for _ in range(10)]
    assert all(one == each[0] for one in each)
    more = {name: each[0][name] - before[name] for name in pids}
    assert sum(more.values()) == len(BODIES)
    assert all(more.values()), "both served some"
    memory = await counted(client, "process_resident_memory_bytes")
    assert len(memory) == 2
    assert len(set(memory.values())) == 2, "each its own"
    free = (await client.http.get("/metrics", params={"name[]": "pd_serve_instance_free_blocks"})).text
    assert len(re.findall("^pd_serve_instance_free_blocks{", free, re.MULTILINE)) == 2, "each instance once"
    servers = set()
    async with asyncio.timeout(60):
        while servers != set(pids):
            event = await live_event(client)
            servers.add(event["server"])
            assert event["outcomes"]["ended"] >= len(BODIES), "the page counts the requests of both"


async def test_the_limit_on_waiting_requests_holds_for_both_together(client: CompletionClient) -> None:
    body = {"model": "tiny", "prompt": token_ids(4000, 1), "max_tokens": 1}
    first = [asyncio.create_task(client.http.post("/v1/completions", json=body)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0.3)  # told to each other
    waiting = [row["requests"] for row in (await client.cluster())["api_servers"]]
    assert sum(waiting) == MAX_WAITING
    for _ in range(6):
        refused = await client.http.post("/v1/completions", json=body)
        assert refused.status_code == 429, refused.text
    assert {(await one).status_code for one in first} == {200}


async def test_the_death_of_one_breaks_its_streams_only_and_another_one_resumes_them(
    client: CompletionClient, server: ServerProcess
) -> None:
    expected = list(map(simulated_answer, BODIES))
    before = await serving(client)
    instances = [row["pid"] for row in (await client.cluster())["instances"]]
    name, pid = next(iter(before.items()))
    async with streams_at_both(client) as streams:
        os.kill(pid, signal.SIGKILL)
        ours = await asyncio.gather(*(stream.answer for stream in streams), return_exceptions=True)
    broken = [isinstance(answer, httpx.HTTPError) for answer in ours]
    assert 0 < sum(broken) < len(ours)
    for stream, answer, body, theirs in zip(streams, ours, BODIES, expected, strict=True):
        if isinstance(answer, httpx.HTTPError):  # the request goes on: its tokens come from the other one
            answer = await client.stream(body, headers={"X-Request-Id": stream.progress.request_id})
        assert not isinstance(answer, BaseException), answer
        assert_same(answer, theirs)
    async with asyncio.timeout(30):  # instances report their counters every second
        while await adopted(client) != sum(broken):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    after = await serving(client, without=pid)
    assert name not in after
    assert set(before) & set(after) == set(before) - {name}
    assert set(await counted(client, "pd_serve_requests_total")) == set(after)
    assert [row["pid"] for row in (await client.cluster())["instances"]] == instances
    assert re.search(rf"{name} was killed by SIGKILL; its streams end", server.tail(100_000))


async def adopted(client: CompletionClient) -> float:
    text = (await client.http.get("/metrics")).text
    return sum(
        map(float, re.findall(r'pd_serve_instance_orphans_total\{.*outcome="adopted".*\} (\S+)', text))
    )


async def test_one_that_stands_still_gets_no_connections(client: CompletionClient) -> None:
    pid = next(iter((await serving(client)).values()))
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(10):
            assert (await client.http.get("/health")).status_code == 200
        assert_same(await client.stream(BODIES[0]), simulated_answer(BODIES[0]))
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_lines_of_the_log_have_the_name_of_their_api_server(
    client: CompletionClient, server: ServerProcess
) -> None:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert "manager" in {line["process"] for line in lines}


async def test_one_that_is_asked_to_end_ends_its_streams(client: CompletionClient) -> None:
    """The last test: the service stops while another API server starts in its place."""
    pid = next(iter((await serving(client)).values()))
    async with streams_at_both(client) as streams:
        os.kill(pid, signal.SIGTERM)
        ours = await answers(streams)  # none of them breaks off
    reasons = [answer.only.finish_reason for answer in ours]
    assert set(reasons) == {"abort", "length"}, reasons
    cluster = await client.until(lambda cluster: len(cluster["api_servers"]) == 1)
    assert cluster["api_servers"][0]["pid"] != pid
