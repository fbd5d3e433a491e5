"""The service as a Ray Serve application: several API servers, and what dies is found or made again.

Simulated engines first, whose words show what becomes of the KV cache; then real ones, by `serve run`, one of
them neutral.
"""

import asyncio
import random
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from pd_serve.models.cache import cache_root
from tests.connections import LIMITS
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import TIMEOUT
from tests.e2e.prompts import token_ids
from tests.e2e.ray_cluster import ENVIRONMENT, RayCluster, free_ports, ray_cluster
from tests.e2e.server_process import ServerProcess
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import answers, streaming
from tests.e2e.test_same_output import assert_same

ROOT = Path(__file__).parents[2]

#: A replica is a new process that imports vLLM, beside whatever else this machine does.
START_S = 180.0

#: Everything together imports it eight times.
READY_S = 600.0

pytestmark = pytest.mark.timeout(900)

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 200} for i in range(6)]


@pytest.fixture(scope="module")
def head(logs: Path) -> Iterator[RayCluster]:
    with ray_cluster(logs / "ray.log", {"include_dashboard": True}) as head:
        yield head


class Application:
    """The application of a Ray cluster: deploy/serve.yaml as it is, but for the port and the engines."""

    def __init__(self, head: RayCluster, logs: Path) -> None:
        self._head = head
        self._path = logs / "serve.yaml"
        self._config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
        self._config["http_options"]["port"] = head.port
        self._arguments: dict[str, Any] = self._config["applications"][0]["args"]
        self._arguments["engine"] = "simulated"
        self._deployed: dict[str, Any] = {"applications": []}

    @property
    def is_deployed(self) -> bool:
        return bool(self._deployed["applications"])

    def deploy_shipped(self) -> None:
        """Returns when it is whole. Does nothing if no test has deployed anything else meanwhile."""
        if self._deployed == self._config:
            return
        self._deploy(self._config)
        self._head.wait_ready(READY_S)
        deadline = time.monotonic() + READY_S
        while not self._is_whole():
            assert time.monotonic() < deadline, self._head.tail()
            time.sleep(0.2)

    def deploy_with(self, **arguments: Any) -> None:
        (application,) = self._config["applications"]
        changed = application | {"args": self._arguments | arguments}
        self._deploy(self._config | {"applications": [changed]})

    def delete(self) -> None:
        self._deploy(self._config | {"applications": []})

    def _deploy(self, config: dict[str, Any]) -> None:
        self._deployed = config
        self._path.write_text(yaml.safe_dump(config))
        self._head.deploy(self._path)

    def _is_whole(self) -> bool:
        try:
            cluster = httpx.get(f"{self._head.url}/cluster").json()
        except (httpx.HTTPError, ValueError):
            return False
        if cluster.get("scheduler", {}).get("state") != "alive":
            return False
        roles = [row["role"] for row in cluster["instances"] if row["state"] == "ready"]
        numbers = [roles.count("prefill"), roles.count("decode"), len(cluster["api_servers"])]
        return numbers == [self._arguments[name] for name in ("prefill", "decode", "api_servers")]


@pytest.fixture(scope="module")
def application(head: RayCluster, logs: Path) -> Application:
    return Application(head, logs)


@pytest.fixture
def server(head: RayCluster, application: Application) -> RayCluster:
    """With the application as it is shipped, whatever the last test has deployed."""
    application.deploy_shipped()
    return head


async def wait_for_servers(client: CompletionClient, number: int) -> dict[str, Any]:
    return await client.until(lambda cluster: len(cluster["api_servers"]) == number, START_S)


def pids(cluster: dict[str, Any]) -> dict[str, int]:
    return {row["id"]: row["pid"] for row in cluster["instances"]}


async def test_streams_through_two_servers_are_whole(client: CompletionClient) -> None:
    await wait_for_servers(client, 2)
    asked = asyncio.gather(*map(client.answer, BODIES))
    streamed = await asyncio.gather(*map(client.stream, BODIES))
    for body, *both in zip(BODIES, await asked, streamed, strict=True):
        for answer in both:
            assert_same(answer, simulated_answer(body))


async def test_a_request_is_moved_whichever_server_is_asked(client: CompletionClient) -> None:
    answer = await client.stream(BODIES[0], client.tour(["decode-0", "decode-1", "decode-0"]))
    assert_same(answer, simulated_answer(BODIES[0]))
    assert {move.status for move in answer.moves} == {200}
    assert len(answer.moves) >= 2


async def test_a_request_is_aborted_when_its_client_leaves(client: CompletionClient) -> None:
    async with client.open({"prompt": token_ids(50), "max_tokens": 4000}) as events:
        await anext(events)
        await client.until(lambda cluster: any(row["running"] for row in cluster["instances"]))
    await client.until(lambda cluster: not any(row["running"] for row in cluster["instances"]))


@pytest.mark.parametrize(
    ("body", "status", "kind", "parameter"),
    [
        ({"model": "nope"}, 404, "NotFoundError", "model"),
        ({"max_tokens": -1}, 400, "BadRequestError", "max_tokens"),
        ({"prompt": token_ids(5000)}, 400, "BadRequestError", "input_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_vllms_form(
    client: CompletionClient, body: Body, status: int, kind: str, parameter: str, stream: bool
) -> None:
    request = {"model": "tiny", "prompt": "x", "max_tokens": 4, "stream": stream, **body}
    response = await client.http.post("/v1/completions", json=request)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"], error["param"]) == (
        status,
        status,
        kind,
        parameter,
    )


async def test_a_request_is_found_whichever_server_is_asked(client: CompletionClient) -> None:
    """A request has one id, in its answer once, and both servers tell its way."""
    body = {"model": "tiny", "prompt": token_ids(20), "max_tokens": 4}
    own = await client.http.post("/v1/completions", json=body, headers={"X-Request-Id": "asked-for"})
    made_up = await client.http.post("/v1/completions", json=body)
    assert own.headers.get_list("x-request-id") == ["asked-for"]
    (given,) = made_up.headers.get_list("x-request-id")
    for name in ["asked-for", given] * 4:
        response = await client.http.get(f"/cluster/requests/{name}")
        assert response.status_code == 200, response.text
        (timeline,) = response.json()["requests"]
        assert (timeline["outcome"], timeline["output_tokens"]) == ("length", 4)
    assert (await client.http.get("/cluster/requests/nobody-s")).status_code == 404


@pytest.mark.parametrize("headers", [{"X-Long": "x" * 40_000}, {f"X-{n}": "x" for n in range(200)}])
async def test_headers_beyond_haproxys_limit_are_refused(
    client: CompletionClient, headers: dict[str, str]
) -> None:
    assert (await client.http.get("/v1/models", headers=headers)).status_code == 400
    assert (await client.http.get("/v1/models")).status_code == 200


async def test_streams_go_on_while_a_dead_manager_is_replaced(
    client: CompletionClient, server: RayCluster
) -> None:
    """The next manager finds all instances; running and new requests do not notice."""
    expected = list(map(simulated_answer, BODIES))
    before = await client.cluster()
    async with streaming(client, BODIES, 20) as streams:
        (manager,) = server.processes("InstanceManager")
        manager.kill()
        late = await client.stream(BODIES[0])
        ours = await answers(streams)
    for answer, theirs in zip([*ours, late], [*expected, expected[0]], strict=True):
        assert_same(answer, theirs)
    async with asyncio.timeout(START_S):
        while not [p for p in server.processes("InstanceManager") if p.pid != manager.pid]:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    last = before["scheduler"]["pid"]
    await client.until(
        lambda cluster: cluster["manager"] == "alive" and cluster["scheduler"]["pid"] not in (last, None),
        START_S,
    )
    after = await wait_for_servers(client, 2)
    assert pids(after) == pids(before)
    await client.drain("decode-1")
    await client.until(lambda cluster: cluster["instances"][2]["draining"])
    await client.drain("decode-1", draining=False)
    await client.until(lambda cluster: not cluster["instances"][2]["draining"])


async def test_a_dead_scheduler_is_replaced(client: CompletionClient) -> None:
    cluster = await client.until(lambda cluster: cluster["scheduler"]["state"] == "alive")
    before = cluster["scheduler"]["pid"]
    async with streaming(client, BODIES[1:2], 20) as streams:
        psutil.Process(before).kill()
        (ours,) = await answers(streams)
    assert_same(ours, simulated_answer(BODIES[1]))
    await client.until(
        lambda cluster: cluster["scheduler"]["state"] == "alive" and cluster["scheduler"]["pid"] != before, 60
    )


async def test_a_dead_api_server_breaks_only_its_own_streams(
    client: CompletionClient, server: RayCluster
) -> None:
    """Its own streams break, the others' go on, and Serve starts another one.

    Requests of the broken streams go on, and a client that asks again gets all of theirs.
    """
    expected = list(map(simulated_answer, BODIES))
    before = await client.cluster()
    async with streaming(client, BODIES, 20) as streams:
        server.processes("ApiServer")[0].kill()
        ours = await asyncio.gather(*(stream.answer for stream in streams), return_exceptions=True)
    whole = [(answer, theirs) for answer, theirs in zip(ours, expected, strict=True) if not is_broken(answer)]
    for answer, theirs in whole:
        assert not isinstance(answer, BaseException)
        assert_same(answer, theirs)
    assert len(whole) < len(ours), "no stream was with the one that died"
    for stream, answer, body, theirs in zip(streams, ours, BODIES, expected, strict=True):
        if is_broken(answer):
            again = {"X-Request-Id": stream.progress.request_id}
            assert_same(await retried(client, body, again), theirs)
    async with asyncio.timeout(30):  # instances report their counters every second
        while await num_adopted(client) != len(ours) - len(whole):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert_same(await retried(client, BODIES[0]), expected[0])
    known = ids_of_api_servers(before)
    after = await client.until(
        lambda cluster: len(cluster["api_servers"]) == 2 and ids_of_api_servers(cluster) != known, START_S
    )
    assert pids(after) == pids(before)
    # Instances drop what the dead one had when they have not heard it for a while.
    await client.until(lambda cluster: not any(row["running"] for row in cluster["instances"]), 60)


def ids_of_api_servers(cluster: dict[str, Any]) -> set[str]:
    return {row["id"] for row in cluster["api_servers"]}


async def num_adopted(client: CompletionClient) -> float:
    metrics = (await client.http.get("/metrics")).text
    adopted = re.findall(r'pd_serve_instance_orphans_total\{.*outcome="adopted".*\} (\S+)', metrics)
    return sum(map(float, adopted))


def is_broken(answer: object) -> bool:
    return isinstance(answer, httpx.HTTPError)


async def retried(client: CompletionClient, body: Body, headers: dict[str, str] | None = None) -> Any:
    """As clients do after a dead API server, until the proxy knows."""
    for _ in range(50):
        try:
            return await client.stream(body, headers=headers)
        except httpx.HTTPError:
            await asyncio.sleep(0.2)
    return await client.stream(body, headers=headers)


async def test_an_application_deployed_again_has_other_instances(
    client: CompletionClient, application: Application
) -> None:
    before = await client.cluster()
    application.deploy_with(decode=1, api_servers=1)
    async with asyncio.timeout(READY_S):
        while not await is_other(client, before):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert len((await client.stream(BODIES[0])).only.token_ids) == 200


async def is_other(client: CompletionClient, before: dict[str, Any]) -> bool:
    try:
        after = await client.cluster()
    except (httpx.HTTPError, AssertionError):  # no server answers meanwhile
        return False
    return len(after["instances"]) == 2 and not set(pids(after).values()) & set(pids(before).values())


async def test_instances_and_scheduler_end_with_the_application(
    head: RayCluster, application: Application
) -> None:
    if not application.is_deployed:
        application.deploy_shipped()
    assert head.processes("InstanceActor")
    assert head.processes("SchedulerActor")
    application.delete()
    async with asyncio.timeout(60):
        while head.processes("InstanceActor") or head.processes("SchedulerActor"):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_serve_run_works_with_real_engines_in_a_home_that_ray_has_used(
    tmp_path: Path, logs: Path
) -> None:
    """Ray leaves a token in the home, which it reads when it is imported: before the application is built."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    environment = ENVIRONMENT | {"HOME": str(home), "PD_SERVE_CACHE": str(cache_root())}
    arguments = ["model=tiny", "prefill=1", "neutral=1", "flags=--no-enable-prefix-caching"]
    (port,) = free_ports(1)
    script = str(Path(__file__).with_name("serve_run.py"))
    run = ServerProcess(
        [sys.executable, script, str(port), *arguments], logs / "serve-run.log", port, environment
    )
    bodies: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 60} for i in range(3)]
    try:
        run.wait_ready(READY_S)
        async with httpx.AsyncClient(base_url=run.url, timeout=TIMEOUT, limits=LIMITS) as http:
            client = CompletionClient(http)
            client.instances = ["prefill-0", "neutral-0"]
            expected = await asyncio.gather(*map(client.answer, bodies))
            wander = [client.wander(random.Random(number)) for number in range(len(bodies))]
            ours = await asyncio.gather(*map(client.stream, bodies, wander))
            assert any(move.done for answer in ours for move in answer.moves)
            await client.until(lambda cluster: cluster["migrations"]["handoff"]["committed"] > 0)
    finally:
        run.kill()
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
