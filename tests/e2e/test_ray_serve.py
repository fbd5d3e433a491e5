"""The service as a Ray Serve application with two API servers, behind HAProxy.

The engines are simulated: their words show what becomes of the KV cache.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from completion_client import Body, CompletionClient
from prompts import token_ids
from ray_cluster import RayCluster, ray_cluster
from test_same_output import assert_same

ROOT = Path(__file__).parents[2]

#: A replica is a new process that imports vLLM, beside whatever else this machine does.
START_S = 180.0

#: Everything together imports it eight times.
READY_S = 600.0

pytestmark = pytest.mark.timeout(900)

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 400} for i in range(6)]


@pytest.fixture(scope="module")
def head(logs: Path) -> Iterator[RayCluster]:
    with ray_cluster(logs / "ray.log", {"include_dashboard": True}) as head:
        yield head


@pytest.fixture(scope="module")
def server(head: RayCluster, logs: Path) -> RayCluster:
    """deploy/serve.yaml as it is, but for the port and the engines."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = head.port
    config["applications"][0]["args"]["engine"] = "simulated"
    path = logs / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    head.deploy(path)
    head.wait_ready(READY_S)
    return head


async def wait_for_servers(client: CompletionClient, number: int) -> dict[str, Any]:
    return await client.until(lambda cluster: len(cluster["api_servers"]) == number, START_S)


async def test_streams_through_two_servers(client: CompletionClient) -> None:
    await wait_for_servers(client, 2)
    expected = await asyncio.gather(*map(client.answer, BODIES))
    streamed = await asyncio.gather(*map(client.stream, BODIES))
    for answer, theirs in zip(streamed, expected, strict=True):
        assert_same(answer, theirs)


async def test_moved_by_hand_whichever_server_is_asked(client: CompletionClient) -> None:
    expected = await client.answer(BODIES[0])
    answer = await client.stream(BODIES[0], client.tour(["prefill-0", "decode-0", "decode-1", "decode-0"]))
    assert_same(answer, expected)
    assert [move.status for move in answer.moves] == [200] * 4


async def test_who_leaves_is_aborted(client: CompletionClient) -> None:
    async with client.open({"prompt": token_ids(50), "max_tokens": 4000}) as events:
        await anext(events)
        await client.until(lambda cluster: any(row["running"] for row in cluster["instances"]))
    await client.until(lambda cluster: not any(row["running"] for row in cluster["instances"]))


@pytest.mark.parametrize(
    ("body", "status", "kind", "parameter"),
    [
        ({"model": "nope"}, 404, "NotFoundError", "model"),
        ({"max_tokens": -1}, 400, "BadRequestError", "max_tokens"),
    ],
)
async def test_errors_are_vllms(
    client: CompletionClient, body: Body, status: int, kind: str, parameter: str
) -> None:
    request = {"model": "tiny", "prompt": "x", "max_tokens": 4, **body}
    response = await client.http.post("/v1/completions", json=request)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"], error["param"]) == (
        status,
        status,
        kind,
        parameter,
    )
