"""Instances are scaled, renewed, drained and replaced under load, and no request notices.

Engines are simulated. Tests leave the cluster whole, but with other instances than before.
"""

import os
import signal
from typing import Any

import pytest

from tests.e2e.commands import run_command
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess, pd_serve
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import answers, load, streaming
from tests.e2e.test_same_output import assert_same

#: A new instance is a new process, beside whatever else this machine does.
START_S = 180.0

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 100} for i in range(4)]

pytestmark = pytest.mark.changes_instances


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


async def command(server: ServerProcess, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command to the running service."""
    return await run_command(*pd_serve(*arguments, "--url", server.url), bound_s=500.0)


def ids(cluster: dict[str, Any], role: str = "", state: str = "ready") -> list[str]:
    rows = cluster["instances"]
    return [row["id"] for row in rows if row["state"] == state and role in ("", row["role"])]


def pid(cluster: dict[str, Any], name: str) -> int:
    (found,) = [row["pid"] for row in cluster["instances"] if row["id"] == name]
    return int(found)


def running(cluster: dict[str, Any], name: str) -> int:
    return sum(row["running"] for row in cluster["instances"] if row["id"] == name)


async def test_streams_stay_whole_while_pools_are_scaled_and_restarted(
    client: CompletionClient, server: ServerProcess
) -> None:
    recomputed = await client.metric("pd_serve_recomputed_requests_total")
    async with load(client, BODIES) as had:
        assert (await command(server, "scale", "decode=3"))[0] == 0
        before = await client.until(lambda cluster: len(ids(cluster, "decode")) == 3, START_S)

        code, output = await command(server, "restart")
        assert code == 0, output
        assert "1 of 4 done" in output
        after = await client.cluster()
        assert (len(ids(after, "prefill")), len(ids(after, "decode"))) == (1, 3)
        assert not set(ids(after)) & set(ids(before))

        assert (await command(server, "scale", "decode=2"))[0] == 0
        await client.until(lambda cluster: len(cluster["instances"]) == 3, START_S)
        assert had
    assert await client.metric("pd_serve_recomputed_requests_total") == recomputed


async def test_a_dead_instance_is_replaced_under_load(client: CompletionClient) -> None:
    cluster = await client.cluster()
    victim = ids(cluster, "decode")[0]
    async with load(client, BODIES):
        os.kill(pid(cluster, victim), signal.SIGKILL)
        await client.until(lambda cluster: victim not in ids(cluster))
        cluster = await client.until(lambda cluster: len(ids(cluster)) == 3, START_S)
        assert f"in the place of {victim}, which has died" in str(cluster["decisions"])


async def test_requests_go_on_when_the_decode_pool_dies_and_one_instance_comes_back(
    client: CompletionClient,
) -> None:
    """Meanwhile the prefill instance decodes what it had to compute again; then it hands that off."""
    bodies: list[Body] = [{"prompt": token_ids(200, i), "max_tokens": 300} for i in range(6)]
    cluster = await client.cluster()
    (prefill,), (drained, victim) = ids(cluster, "prefill"), ids(cluster, "decode")
    await client.drain(drained)
    await client.until(lambda cluster: drained in ids(cluster, state="draining"))
    async with streaming(client, bodies, 30) as streams:
        os.kill(pid(cluster, victim), signal.SIGKILL)
        await client.until(lambda cluster: running(cluster, prefill) == 6)
        await client.drain(drained, draining=False)
        ours = await answers(streams)
    for body, answer in zip(bodies, ours, strict=True):
        assert_same(answer, simulated_answer(body))
        assert (await client.handed_off(answer.request_id, 2))[-1] != victim
    await client.until(lambda cluster: len(ids(cluster)) == 3, START_S)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("scale", "decode=0"), 1, "prefill and decode instances need each other"),
        (("scale", "encode=1"), 2, "no role 'encode'"),
        (("scale", "decode"), 2, "must be ROLE=N"),
        (("drain", "decode-99"), 1, "no instance 'decode-99'"),
        (("drain", "PREFILL"), 1, "the last instance that takes new requests"),
    ],
)
async def test_an_impossible_command_is_refused_with_its_reason(
    client: CompletionClient, server: ServerProcess, arguments: tuple[str, ...], code: int, says: str
) -> None:
    (prefill,) = ids(await client.cluster(), "prefill")
    found, output = await command(server, *(argument.replace("PREFILL", prefill) for argument in arguments))
    assert (found, says in output) == (code, True), output


async def test_an_instance_drained_with_stop_ends_without_recomputation(client: CompletionClient) -> None:
    bodies: list[Body] = [{"prompt": token_ids(200, i), "max_tokens": 200} for i in range(4)]
    recomputed = await client.metric("pd_serve_recomputed_requests_total")
    before = await client.cluster()
    async with streaming(client, bodies, 10) as streams:
        busy = await client.until(
            lambda cluster: all(running(cluster, name) for name in ids(cluster, "decode"))
        )
        drained = ids(busy, "decode")[0]
        await client.drain(drained, stop=True)
        after = await client.until(lambda cluster: len(cluster["instances"]) == 2)
        assert not all(stream.answer.done() for stream in streams), "it was empty because they had ended"
        ours = await answers(streams)
    for body, answer in zip(bodies, ours, strict=True):
        assert_same(answer, simulated_answer(body))
    assert moved_by_drains(after) > moved_by_drains(before)
    assert (await client.cluster())["decisions"][0]["what"] == (
        f"{drained} is stopped: drained by the operator"
    )
    assert await client.metric("pd_serve_recomputed_requests_total") == recomputed
    response = await client.http.post("/cluster/scale", json={"decode": 2})
    assert response.status_code == 202
    await client.until(lambda cluster: len(ids(cluster, "decode")) == 2, START_S)


def moved_by_drains(cluster: dict[str, Any]) -> int:
    return int(cluster["migrations"].get("drain", {"committed": 0})["committed"])
