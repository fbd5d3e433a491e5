"""Simulated instances that share processes: like others, but one that dies ends all of its instances."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.browser import browser_page, find_chromium
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import answers, load, streaming
from tests.e2e.test_operator_commands import START_S, command, ids, pid
from tests.e2e.test_same_output import assert_same

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 150} for i in range(6)]

CHROMIUM = find_chromium()
CARDS = "document.querySelectorAll('.instance').length"

pytestmark = pytest.mark.changes_instances


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """Two prefill and seven decode instances in three processes."""
    flags = ("--engine", "simulated", "--prefill", "2", "--decode", "7", "--instances-per-process", "3")
    with run_cluster(logs / "shared-processes.log", *flags) as server:
        yield server


def processes(cluster: dict[str, Any]) -> Counter[int]:
    """Number of instances by process id."""
    return Counter(row["pid"] for row in cluster["instances"] if row["pid"])


async def test_requests_move_within_a_process_and_between_two(client: CompletionClient) -> None:
    cluster = await client.cluster()
    assert sorted(processes(cluster).values()) == [3, 3, 3]
    assert pid(cluster, "decode-1") == pid(cluster, "decode-2") != pid(cluster, "decode-0")
    body: Body = {"prompt": token_ids(500, 2), "max_tokens": 150}

    answer = await client.stream(body, client.tour(["decode-1", "decode-2", "decode-0", "decode-2"]))

    assert_same(answer, simulated_answer(body))
    assert sum(move.done for move in answer.moves) >= 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's `chromium`)")
async def test_the_page_finds_instances_among_many(server: ServerProcess) -> None:
    assert CHROMIUM is not None
    async with browser_page(CHROMIUM) as page:
        await page.page.goto(f"{server.url}/dashboard", wait_until="commit")
        await page.wait_until(f"{CARDS} === 9")
        for words, found in {"decode-1": 1, "DECODE ready": 7, "prefill decode": 0, "": 9}.items():
            await page.page.fill("#find", words)
            assert await page.page.evaluate(CARDS) == found
            shown = f"{found} of 9 shown" if found < 9 else ""
            assert await page.page.evaluate("document.querySelector('#shown').textContent") == shown
            if found == 1:  # the numbers of the pool stay those of all its instances
                assert "7 of 7 wanted" in await page.page.evaluate(
                    "document.querySelector('.group.decode').textContent"
                )
        assert page.complaints == []


async def test_the_death_of_a_process_costs_no_request(client: CompletionClient) -> None:
    """All of its instances are replaced, at once: they count as one failed start."""
    before = await client.cluster()
    async with streaming(client, BODIES, 10) as streams:
        dying = pid(await client.cluster(), "decode-2")
        os.kill(dying, signal.SIGKILL)
        ours = await answers(streams)
    for body, answer in zip(BODIES, ours, strict=True):
        assert_same(answer, simulated_answer(body))
    cluster = await client.until(lambda c: len(ids(c)) == 9 and dying not in processes(c), START_S)
    kept = {row["id"] for row in before["instances"] if row["pid"] != dying}
    assert kept < set(ids(cluster))
    client.instances = ids(cluster)


async def test_a_rolling_restart_replaces_the_processes(
    client: CompletionClient, server: ServerProcess
) -> None:
    before = await client.cluster()
    async with load(client, BODIES):
        code, output = await command(server, "restart")
        assert code == 0, output
    cluster = await client.cluster()
    assert not processes(before).keys() & processes(cluster).keys()
    assert sorted(processes(cluster).values()) == [3, 3, 3]
    client.instances = ids(cluster)
