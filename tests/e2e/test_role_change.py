"""An instance of the pool that has too little to do serves the other one, without a restart, and back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import load

#: One token each: nearly nothing is left for the decode instances.
PROMPTS: list[Body] = [{"prompt": token_ids(600, i), "max_tokens": 1} for i in range(20)]
DECODES: list[Body] = [{"prompt": token_ids(200, i), "max_tokens": 300} for i in range(10)]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """A decode instance has 143 usable blocks of 32 tokens."""
    flags = ("--prefill", "1", "--decode", "2", "--max-model-len", "2048", "--no-enable-prefix-caching")
    few_blocks = ("--decode-kv-cache-memory-bytes", str(144 * 2**17))
    settings = {"roles": True, "scale_interval_s": 1, "scale_margin": 5, "backlog_high_tokens": 4000}
    changed = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    with run_cluster(logs / "roles.log", *flags, *few_blocks, *changed) as server:
        yield server


def with_role(cluster: dict[str, Any], role: str) -> list[str]:
    return [row["id"] for row in cluster["instances"] if row["role"] == role]


async def test_an_idle_decode_instance_becomes_prefill_and_back(
    client: CompletionClient, reference: Reference
) -> None:
    async with load(client, reference, PROMPTS):
        cluster = await client.until(lambda cluster: len(with_role(cluster, "prefill")) == 2)
        (helper,) = set(with_role(cluster, "prefill")) - {"prefill-0"}
        assert f"{helper} becomes prefill: prefill: " in str(cluster["decisions"])
        await client.until(
            lambda cluster: all(
                row["waiting"] or row["running"] for row in cluster["instances"] if row["role"] == "prefill"
            )
        )
    async with load(client, reference, DECODES):
        cluster = await client.until(lambda cluster: len(with_role(cluster, "decode")) == 2, 30.0)
        assert len(with_role(cluster, "prefill")) == 1
        await client.until(
            lambda cluster: all(row["running"] for row in cluster["instances"] if row["role"] == "decode")
        )
