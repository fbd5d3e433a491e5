"""An instance of the pool that has too little to do serves the other one, without a restart, and back."""

from typing import Any

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import load

#: One token each: nearly nothing is left for the decode instances.
PROMPTS: list[Body] = [{"prompt": token_ids(1200, i), "max_tokens": 1} for i in range(20)]

#: 63 blocks each: one decode instance is too full for them.
DECODES: list[Body] = [{"prompt": token_ids(1000, i), "max_tokens": 100} for i in range(10)]


pytestmark = pytest.mark.changes_instances


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


def with_role(cluster: dict[str, Any], role: str) -> list[str]:
    return [row["id"] for row in cluster["instances"] if row["role"] == role]


async def test_an_idle_decode_instance_becomes_prefill_and_back(client: CompletionClient) -> None:
    before = with_role(await client.cluster(), "prefill")
    async with load(client, PROMPTS):
        cluster = await client.until(lambda cluster: len(with_role(cluster, "prefill")) == 2)
        (helper,) = set(with_role(cluster, "prefill")) - set(before)
        assert f"{helper} becomes prefill: prefill: " in str(cluster["decisions"])
        await client.until(
            lambda cluster: all(
                row["waiting"] or row["running"] for row in cluster["instances"] if row["role"] == "prefill"
            )
        )
    async with load(client, DECODES):
        cluster = await client.until(lambda cluster: len(with_role(cluster, "decode")) == 2)
        assert len(with_role(cluster, "prefill")) == 1
        await client.until(
            lambda cluster: all(row["running"] for row in cluster["instances"] if row["role"] == "decode")
        )
