"""What a cluster tells of itself, told to those who listen: a Prometheus, a collector of spans, a log."""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.otlp_receiver import OtlpReceiver
from tests.e2e.prometheus import Prometheus, tool
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if (program := tool("prometheus")) is None:
        pytest.skip("no prometheus on the PATH, and apt-get cannot fetch its package")
    shipped = DEPLOY / "prometheus" / "prometheus.yml"
    target = server.url.removeprefix("http://")
    prometheus = Prometheus(program, shipped, target, tmp_path_factory.mktemp("prometheus"))
    yield prometheus
    prometheus.stop()


async def moved_request(client: CompletionClient, name: str, headers: dict[str, str] | None = None) -> None:
    """Is handed off, and moves to and fro by hand while it streams."""
    body = {"model": "tiny", "prompt": token_ids(300), "max_tokens": 60, "ignore_eos": True, "stream": True}
    headers = {"X-Request-Id": name} | (headers or {})
    async with client.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        seen, places = 0, ["decode-1", "decode-0"]
        async for line in response.aiter_lines():
            seen += line.startswith("data: {")
            if seen in (15, 30) and line and places:
                move = await client.migrate(name, places[0])
                if move.done or "already" in str(move.body):
                    places.pop(0)


async def timeline(client: CompletionClient, name: str) -> dict[str, Any]:
    response = await client.http.get(f"/cluster/requests/{name}")
    assert response.status_code == 200, response.text
    (found,) = response.json()["requests"]
    return dict(found)


async def test_a_timeline_shows_stages_instances_and_migrations(client: CompletionClient) -> None:
    await moved_request(client, "traveller")

    found = await timeline(client, "traveller")

    assert (found["state"], found["outcome"], found["output_tokens"]) == ("ended", "length", 60)
    assert [stage["stage"] for stage in found["stages"]][:4] == ["dispatch", "queue", "prefill", "handoff"]
    ends = [stage["end_s"] for stage in found["stages"]]
    assert ends == sorted(ends)
    assert ends[-1] == found["e2e_s"]
    assert found["instances"][0]["instance"] == "prefill-0"
    assert {stay["instance"] for stay in found["instances"][1:]} == {"decode-0", "decode-1"}
    reasons = [(move["reason"], move["outcome"]) for move in found["migrations"]]
    assert reasons[0] == ("handoff", "committed")
    assert ("manual", "committed") in reasons
    for move in found["migrations"]:
        assert move["downtime_s"] > 0
        assert move["bytes"] > 0
        assert move["stages"], "a committed migration has a tail at least"
    assert (await timeline(client, found["id"]))["id"] == found["id"]


async def test_a_timeline_of_an_unknown_request_is_404(client: CompletionClient) -> None:
    response = await client.http.get("/cluster/requests/nobody")

    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (404, "request_id")


async def drained(client: CompletionClient) -> None:
    """Requests that move by the scheduler's will."""
    bodies: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 100} for i in range(4)]
    answers = [asyncio.create_task(client.answer(body)) for body in bodies]
    await client.until(lambda cluster: sum(i["running"] for i in cluster["instances"][1:]) == 4)
    await client.drain("decode-0")
    await asyncio.gather(*answers)
    await client.drain("decode-0", draining=False)
    await client.until(lambda cluster: all(not i["draining"] for i in cluster["instances"]))


async def test_every_query_of_the_dashboards_has_data(
    client: CompletionClient, prometheus: Prometheus
) -> None:
    """Every query of every panel has an answer; and the ones that matter most, the right one."""
    await asyncio.to_thread(prometheus.wait_for_scrapes, 2)
    await client.integrity()
    await moved_request(client, "scraped")
    await drained(client)
    await asyncio.to_thread(prometheus.wait_for_scrapes, 3)

    silent = []
    for path in DASHBOARDS:
        panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]
        assert panels
        for panel in panels:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m")
                query = re.sub(r"\$(instance|service|model)\b", ".*", query)
                assert "$" not in query, query
                if not await asyncio.to_thread(prometheus.has_data, query):
                    silent.append(f"{path.name}: {panel['title']}: {query}")
    assert silent == []

    def value(query: str) -> float:
        assert prometheus.has_data(query), query
        (found,) = prometheus.query(query)
        return float(found["value"][1])

    assert value("count(max by (instance) (pd_serve_instance_info))") == 3
    assert value('sum(pd_serve_requests_total{service="pd-serve",model_name="tiny",outcome="length"})') >= 5
    assert value('sum(pd_serve_migrations_total{reason="handoff",outcome="committed"})') >= 5
    assert value('sum(pd_serve_migrations_total{reason="drain",outcome="committed"})') >= 1
    assert value("sum(pd_serve_inter_token_latency_seconds_count)") >= 59 + 4 * 99
    assert value("sum(pd_serve_integrity_violations_total)") == 0
    assert value("sum(vllm:prompt_tokens_total)") >= 300 + 4 * 100
    assert value("sum(vllm:prefix_cache_queries_total)") >= 300 + 4 * 100
    labels = [found["metric"] for found in prometheus.query("vllm:num_requests_running")]
    assert {metric["instance"] for metric in labels} == {"prefill-0", "decode-0", "decode-1"}
    assert all("api_server" in metric for metric in labels)
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert rules
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []


def test_promtool_finds_nothing_wrong_with_our_metrics(server: ServerProcess) -> None:
    """Prometheus' own linter finds nothing wrong with ours."""
    if (promtool := tool("promtool")) is None:
        pytest.skip("no promtool on the PATH, and apt-get cannot fetch prometheus' package")
    text = httpx.get(f"{server.url}/metrics").text
    lint = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    config = DEPLOY / "prometheus" / "prometheus.yml"
    checked = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True)

    assert [line for line in lint.stderr.splitlines() if line.startswith("pd_serve_")] == []
    assert checked.returncode == 0, checked.stderr


async def test_spans_of_a_request_are_children_of_the_clients_span(
    client: CompletionClient, receiver: OtlpReceiver
) -> None:
    """Children of the client's span: the request, and in it what has become of it."""
    await moved_request(client, "traced", {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"})

    def ours() -> list[Any]:
        return [span for span in list(receiver.spans) if span.trace_id.hex() == TRACE]

    for _ in range(300):
        if "request" in [span.name for span in ours()]:
            break
        await asyncio.sleep(0.1)
    spans = ours()
    (root,) = [span for span in spans if span.name == "request"]
    assert root.parent_span_id.hex() == CLIENT_SPAN
    children = [span for span in spans if span.parent_span_id == root.span_id]
    names = [span.name for span in children]
    assert {"dispatch", "queue", "prefill", "handoff", "decode", "migration"} <= set(names)
    for span in children:
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    for migration in [span for span in children if span.name == "migration"]:
        stages = [span.name for span in spans if span.parent_span_id == migration.span_id]
        assert stages.count("tail") == 1
    attributes = {a.key: a.value.string_value for a in root.attributes}
    assert attributes["pd_serve.request.name"] == "cmpl-traced-0"


async def test_log_lines_follow_a_request_through_all_processes(
    client: CompletionClient, server: ServerProcess
) -> None:
    """JSON each, and with one request's id from the API server through all instances to the end."""
    await moved_request(client, "logged")
    request_id = (await timeline(client, "logged"))["id"]
    [api_server] = [row["id"] for row in (await client.cluster())["api_servers"]]

    def lines() -> list[dict[str, Any]]:
        found = []
        for line in server.tail(10_000_000).splitlines():
            if line.startswith("{"):
                found.append(json.loads(line))
        return [line for line in found if line.get("request_id") == request_id]

    for _ in range(100):  # Ray passes on the instances' lines now and then
        mine = lines()
        if {api_server, "prefill-0", "decode-0", "decode-1"} <= {line["process"] for line in mine}:
            break
        await asyncio.sleep(0.1)
    assert {line["process"] for line in mine} == {api_server, "prefill-0", "decode-0", "decode-1"}
    events = [line["event"] for line in mine if line["process"] == api_server and "event" in line]
    assert events[:3] == ["issued", "dispatched", "prefilled"]
    assert events.count("migrated") >= 2
    assert "ended" in events
    for line in mine:
        assert {"time", "level", "logger", "message"} <= set(line)
