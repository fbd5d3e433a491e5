"""LoRA adapters in a cluster: given at the start, loaded and unloaded at run time, moved and recomputed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_serve.models.lora import adapters
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--prefill", "1", "--decode", "2", "--no-enable-prefix-caching")
    flags += ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
    flags += ("--lora-modules", f"first={adapters(2)[0]}")
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with run_cluster(logs / "lora.log", *flags, environment=runtime) as server:
        yield server


def body(model: str, max_tokens: int = 150) -> Body:
    return {"model": model, "prompt": token_ids(700), "max_tokens": max_tokens}


async def models(client: CompletionClient) -> list[str]:
    return [model["id"] for model in (await client.http.get("/v1/models")).json()["data"]]


async def test_a_request_with_an_adapter_is_handed_off_and_moves(client: CompletionClient) -> None:
    assert await models(client) == ["tiny", "first"]
    base, unmoved = await client.stream(body("tiny")), await client.stream(body("first"))
    assert base.only.token_ids != unmoved.only.token_ids
    assert len(await client.handed_off(unmoved.request_id)) == 1
    moved = await client.stream(body("first"), client.wander(random.Random(1), 0.02))
    assert_same(moved, unmoved)
    assert any(move.done for move in moved.moves)


async def test_an_adapter_is_loaded_at_run_time_and_its_requests_survive(client: CompletionClient) -> None:
    """Its instance is killed; the one that replaces it has never been told of the adapter."""
    adapter = {"lora_name": "second", "lora_path": adapters(2)[1]}
    assert (await client.http.post("/v1/completions", json=body("second"))).status_code == 404
    missing = adapter | {"lora_path": "/nowhere"}
    assert (await client.http.post("/v1/load_lora_adapter", json=missing)).status_code in (404, 500)
    assert await models(client) == ["tiny", "first"]
    answer = await client.http.post("/v1/load_lora_adapter", json=adapter)
    assert answer.status_code == 200, answer.text
    assert await models(client) == ["tiny", "first", "second"]
    expected = await client.stream(body("second", 400))
    assert expected.only.token_ids[:150] != (await client.stream(body("first"))).only.token_ids

    assert_same(await client.stream(body("second", 400), client.kill_after(60)), expected)
    recomputed = await client.metric("pd_serve_recomputed_requests_total")
    assert recomputed >= 1
    ready = await client.until(lambda seen: [i["state"] for i in seen["instances"]] == ["ready"] * 3)
    client.instances = [instance["id"] for instance in ready["instances"]]
    moved = await client.stream(body("second"), client.wander(random.Random(2), 0.02))
    assert moved.only.token_ids == expected.only.token_ids[:150]

    answer = await client.http.post("/v1/unload_lora_adapter", json={"lora_name": "second"})
    assert answer.status_code == 200, answer.text
    assert await models(client) == ["tiny", "first"]
    assert (await client.http.post("/v1/completions", json=body("second"))).status_code == 404
