"""Prefill on one node of a Ray cluster and decode on another, one of which has no room at first."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.ray_cluster import RayCluster, ray_cluster
from tests.e2e.server_process import ServerProcess, pd_serve
from tests.e2e.simulated import simulated_answer
from tests.e2e.test_same_output import assert_same

#: Ray has to start twice over.
READY_S = 600.0

#: One more instance, beside whatever else this machine does.
START_S = 180.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def nodes(logs: Path) -> Iterator[RayCluster]:
    a, b = {"resources": {"node_a": 2}}, {"resources": {"node_b": 1}}
    with ray_cluster(logs / "two_nodes.log", a, b) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def server(nodes: RayCluster, logs: Path) -> Iterator[ServerProcess]:
    """Two decode instances are asked for, and there is room for one."""
    flags = ["--engine", "simulated", "--prefill", "1", "--decode", "2"]
    flags += ["--prefill-resources", '{"node_a": 1}', "--decode-resources", '{"node_b": 1}']
    command = pd_serve("serve", "tiny", "--port", "0", "--ray-address", nodes.address(), *flags)
    server = ServerProcess(command, logs / "joined.log", environment=nodes.environment)
    try:
        server.wait_ready(READY_S)
        yield server
        left = server.signal_and_wait()
        assert not left, f"left after SIGTERM: {left}\n{server.tail()}"
    finally:
        server.kill()


def raylet_of(pid: int) -> int:
    (raylet,) = [p.pid for p in psutil.Process(pid).parents() if p.name() == "raylet"]
    return raylet


async def test_roles_are_on_their_nodes_and_requests_move_between_them(client: CompletionClient) -> None:
    cluster = await client.cluster()
    placed = {row["id"]: row["pid"] for row in cluster["instances"] if row["pid"]}
    decode = next(name for name in placed if name.startswith("decode"))
    assert set(placed) == {"prefill-0", decode}
    assert raylet_of(placed["prefill-0"]) != raylet_of(placed[decode])

    body: Body = {"prompt": token_ids(200), "max_tokens": 120}
    expected = simulated_answer(body)
    # The first ones connect the two: on a busy machine they end before they could be handed off.
    async with asyncio.timeout(60):
        while not (await client.cluster())["migrations"].get("handoff", {}).get("committed"):
            assert_same(await client.stream(body), expected)
    answer = await client.stream(body, client.tour(["prefill-0"] * 3))
    assert_same(answer, expected)
    assert [move.body for move in answer.moves if not move.done] == []
    assert answer.moves  # and it was handed off again after each of them


async def test_an_instance_without_room_shows_what_it_waits_for(client: CompletionClient) -> None:
    (row,) = [row for row in (await client.cluster())["instances"] if not row["pid"]]
    assert (row["role"], row["state"]) == ("decode", "waiting for resources: 1 node_b")


async def test_a_waiting_instance_starts_when_room_becomes_free(client: CompletionClient) -> None:
    """Nobody has to ask again."""
    cluster = await client.cluster()
    (there,) = [row for row in cluster["instances"] if row["role"] == "decode" and row["pid"]]
    (coming,) = [row["id"] for row in cluster["instances"] if not row["pid"]]
    os.kill(there["pid"], 9)
    await client.until(
        lambda cluster: coming in [row["id"] for row in cluster["instances"] if row["state"] == "ready"],
        START_S,
    )
