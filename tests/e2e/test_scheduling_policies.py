"""Two small neutral instances: de-fragmentation against dispatch alone, and requests that go first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from completion_client import Body, CompletionClient
from conftest import Reference, run_cluster
from prompts import token_ids
from server_process import ServerProcess
from streams import Stream, answers, streaming
from test_same_output import assert_same


@pytest.fixture(scope="module", params=["llumnix", "infaas++"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(logs: Path, policy: str) -> Iterator[ServerProcess]:
    """An instance has 71 usable blocks of 32 tokens."""
    flags = ("--neutral", "2", "--max-model-len", "2048", "--no-enable-prefix-caching", "--policy", policy)
    few_blocks = ("--kv-cache-memory-bytes", str(72 * 2**17))
    with run_cluster(logs / f"{policy}.log", *flags, *few_blocks) as server:
        yield server


async def test_room_in_pieces(client: CompletionClient, reference: Reference, policy: str) -> None:
    """Both instances have 43 blocks free, and 47 are needed: one instance has to make room for it."""
    blocking: list[Body] = [{"prompt": token_ids(416, i), "max_tokens": 288} for i in range(4)]
    large: Body = {"prompt": token_ids(1500), "max_tokens": 20}
    expected = [await reference(body) for body in (*blocking, large)]
    async with streaming(client, blocking, 20) as streams:
        batches = [row["running"] for row in (await client.cluster())["instances"]]
        assert batches == [2, 2]
        last = Stream(client, large)
        ours = [*await answers(streams), await last.answer]
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    waited_for = sum(stream.last_token_at < last.first_token_at for stream in streams)
    moved = (await client.cluster())["migrations"].get("defragment", {"committed": 0})["committed"]
    if policy == "llumnix":
        assert (waited_for, moved > 0) == (0, True)
    else:
        assert (waited_for > 0, moved) == (True, 0)


@pytest.mark.parametrize("how", ["body", "header"])
async def test_high_priority_overtakes(
    client: CompletionClient, reference: Reference, policy: str, how: str
) -> None:
    """Four requests fill both instances and six wait; what comes last goes first where it is."""
    running: list[Body] = [{"prompt": token_ids(900, i), "max_tokens": 150} for i in range(4)]
    waiting: list[Body] = [{"prompt": token_ids(800, i), "max_tokens": 20} for i in range(6)]
    urgent: Body = {"prompt": token_ids(700), "max_tokens": 20}
    expected = [await reference(body) for body in (*running, *waiting, urgent)]
    async with streaming(client, running, 10) as streams:
        queued = [Stream(client, body) for body in waiting]
        await client.until(lambda cluster: sum(row["waiting"] for row in cluster["instances"]) == 6)
        if how == "body":
            first = Stream(client, urgent | {"priority": -1})
        else:
            first = Stream(client, urgent, {"X-Vllm-Priority": "-1"})
        ours = await answers([*streams, *queued, first])
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    before = sum(stream.first_token_at < first.first_token_at for stream in queued)
    assert before <= 3, "as many as may have entered the other instance meanwhile"
