"""A decode pool of one or two simulated instances that follows the load, in seconds instead of minutes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import load

#: A new instance is a new process.
START_S = 180.0

#: 122 blocks each, and a few more at the end.
BODIES: list[Body] = [{"prompt": token_ids(1950, i), "max_tokens": 100} for i in range(6)]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """An instance has 780 blocks of 16 tokens."""
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "1")
    settings = {"scale_interval_s": 1, "drain_after_s": 2, "scale_threshold": 10, "scale_margin": 5}
    scaling = ["--autoscale-decode", "1:2"]
    for key, value in settings.items():
        scaling += ["--set", f"{key}={value}"]
    with run_cluster(logs / "autoscaling.log", *flags, *scaling) as server:
        yield server


def pool(cluster: dict[str, Any], state: str = "ready") -> list[str]:
    rows = cluster["instances"]
    return [row["id"] for row in rows if row["role"] == "decode" and row["state"] == state]


async def test_the_pool_grows_and_shrinks_with_the_load(client: CompletionClient) -> None:
    async with load(client, BODIES):
        cluster = await client.until(lambda cluster: pool(cluster, "starting") == ["decode-1"])
        assert "decode-1 is started: average freeness" in str(cluster["decisions"])
        await client.until(lambda cluster: len(pool(cluster)) == 2, START_S)
        await client.until(
            lambda cluster: all(row["running"] for row in cluster["instances"] if row["id"] in pool(cluster))
        )
    async with load(client, BODIES[:2]):
        await client.until(lambda cluster: "is stopped: drained and empty" in str(cluster["decisions"]))
        cluster = await client.until(lambda cluster: len(cluster["instances"]) == 2)
        assert len(pool(cluster)) == 1


async def test_the_last_decode_instance_is_not_drained_and_is_replaced(client: CompletionClient) -> None:
    """The last one cannot be drained, and when it dies another one is started."""
    (only,) = pool(await client.cluster())
    response = await client.http.post("/cluster/drain", json={"instance": only})
    assert response.status_code == 409
    assert "the last decode instance" in response.json()["error"]["message"]
    async with load(client, BODIES[:2]):
        (row,) = [row for row in (await client.cluster())["instances"] if row["id"] == only]
        os.kill(row["pid"], signal.SIGKILL)
        await client.until(lambda cluster: only not in pool(cluster))
        await client.until(lambda cluster: len(pool(cluster)) == 1, START_S)
