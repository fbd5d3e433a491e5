"""Prompt embeddings and thinking budgets in a cluster: handed off, moved, and recomputed."""

import base64
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pd_serve.models.tiny import TINY
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same

TOOL, END = 262, 263

pytestmark = pytest.mark.skipif(
    "PD_SERVE_ALL_KINDS" not in os.environ,
    reason="`make kinds` runs it; test_vllm_engine_request_kinds.py has the same without a cluster",
)


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--prefill", "1", "--decode", "2", "--no-enable-prefix-caching", "--enable-prompt-embeds")
    thinking = '{"reasoning_start_str": "<|tool|>", "reasoning_end_str": "<|end|>"}'
    with run_cluster(logs / "kinds.log", *flags, "--reasoning-config", thinking) as server:
        yield server


def embeddings(num_tokens: int = 700) -> str:
    tensor = 0.5 * torch.randn(num_tokens, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


BODIES: dict[str, Body] = {
    "prompt embeddings": {"prompt_embeds": embeddings(), "max_tokens": 200},
    "thinking budget": {
        "prompt": [*token_ids(700), TOOL],
        "thinking_token_budget": 120,
        "max_tokens": 200,
        "logit_bias": {"262": -100},
    },
}


@pytest.mark.parametrize("kind", BODIES)
async def test_it_is_handed_off_moves_and_survives_its_instance(client: CompletionClient, kind: str) -> None:
    body = BODIES[kind]
    unmoved = await client.stream(body)
    assert len(await client.handed_off(unmoved.request_id)) == 1
    if kind == "thinking budget":
        assert unmoved.only.token_ids[120] == END
    moved = await client.stream(body, client.wander(random.Random(1), 0.02))
    assert_same(moved, unmoved)
    assert any(move.done for move in moved.moves)

    assert_same(await client.stream(body, client.kill_after(60)), unmoved)
    assert await client.metric("pd_serve_recomputed_requests_total") >= 1
    await client.until(lambda seen: [i["state"] for i in seen["instances"]] == ["ready"] * 3)
