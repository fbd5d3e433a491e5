"""Disaggregation over tensor parallelism: a prefill instance with one worker, a decode instance with two."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import answers, streaming
from tests.e2e.test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--prefill", "1", "--decode", "1", "--decode-tensor-parallel-size", "2", "--no-replace")
    with run_cluster(logs / "workers.log", *flags, "--no-enable-prefix-caching") as server:
        yield server


async def workers(client: CompletionClient, instance: str) -> list[psutil.Process]:
    """The worker processes of an instance."""
    (row,) = [row for row in (await client.cluster())["instances"] if row["id"] == instance]
    children = psutil.Process(row["pid"]).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("length", "more"), [(1500, {}), (300, {"temperature": 1, "seed": 5})], ids=["greedy", "seeded"]
)
async def test_a_handed_off_request_has_plain_vllms_answer(
    client: CompletionClient, reference: Reference, length: int, more: dict[str, int]
) -> None:
    body = {"prompt": token_ids(length), "max_tokens": 60} | more

    answer = await client.stream(body)

    assert_same(answer, await reference(body))
    assert len(await client.handed_off(answer.request_id)) == 1


async def test_streams_survive_a_worker_that_dies_and_nothing_is_left_of_its_instance(
    client: CompletionClient, reference: Reference
) -> None:
    """The last test of the cluster: its decode instance is gone after it."""
    bodies: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 150} for i in range(3)]
    expected = [await reference(body) for body in bodies]
    processes = await workers(client, "decode-0")
    assert len(processes) == 2

    def decoding(cluster: dict[str, Any]) -> bool:
        return any(row["id"] == "decode-0" and row["running"] == 3 for row in cluster["instances"])

    async with streaming(client, bodies, 10) as streams:
        await client.until(decoding)
        os.kill(processes[1].pid, signal.SIGKILL)
        ours = await answers(streams)

    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    await client.until(lambda cluster: [row["id"] for row in cluster["instances"]] == ["prefill-0"])
    psutil.wait_procs(processes, timeout=30)
    assert not [process for process in processes if process.is_running()]
