"""Instances with several workers: tensor parallelism inside an instance."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    with run_cluster(logs / "workers.log", "--neutral", "1", "--tensor-parallel-size", "2") as server:
        yield server


@pytest.mark.parametrize(
    ("length", "more"), [(1500, {}), (300, {"temperature": 1, "seed": 5})], ids=["greedy", "seeded"]
)
async def test_two_tensor_parallel_workers_answer_as_plain_vllm(
    client: CompletionClient, reference: Reference, length: int, more: dict[str, int]
) -> None:
    body = {"prompt": token_ids(length), "max_tokens": 60} | more
    assert_same(await client.stream(body), await reference(body))
