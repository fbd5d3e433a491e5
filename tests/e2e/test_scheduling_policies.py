"""Two small neutral instances: de-fragmentation against dispatch alone, and requests that go first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import Stream, answers, streaming
from tests.e2e.test_same_output import assert_same

#: By title: a request that waits for room is bound to an instance after 15 s. Where that is what is looked
#: at it has to be sooner: here nothing lasts as long.
SETTINGS = {
    "llumnix": ("--policy", "llumnix"),
    "llumnix, bound soon": ("--policy", "llumnix", "--set", "bind_after_s=0.2"),
    "infaas++": ("--policy", "infaas++"),
}


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(settings: str) -> str:
    return SETTINGS[settings][1]


@pytest.fixture(scope="module")
def server(logs: Path, settings: str) -> Iterator[ServerProcess]:
    """An instance has 71 usable blocks of 32 tokens."""
    flags = ("--neutral", "2", "--max-model-len", "2048", "--no-enable-prefix-caching", *SETTINGS[settings])
    few_blocks = ("--kv-cache-memory-bytes", str(72 * 2**17))
    with run_cluster(logs / f"{settings}.log", *flags, *few_blocks) as server:
        yield server


@pytest.mark.parametrize("settings", ["llumnix, bound soon", "infaas++"], indirect=True)
async def test_defragmentation_makes_room_for_a_large_request(
    client: CompletionClient, reference: Reference, policy: str
) -> None:
    """Both instances have 43 blocks free, and 47 are needed: one instance has to make room for it.

    With `llumnix` it waits in the line first, then at the instance that gives requests away.
    """
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


@pytest.mark.parametrize("settings", ["llumnix", "infaas++"], indirect=True)
@pytest.mark.parametrize("how", ["body", "header"])
async def test_a_high_priority_request_overtakes_waiting_ones(
    client: CompletionClient, reference: Reference, policy: str, how: str
) -> None:
    """Four requests fill both instances and six wait; what comes last goes first.

    With `llumnix` they wait in one line, but for the one that is bound to an instance meanwhile.
    """
    running: list[Body] = [{"prompt": token_ids(900, i), "max_tokens": 150} for i in range(4)]
    waiting: list[Body] = [{"prompt": token_ids(800, i), "max_tokens": 20} for i in range(6)]
    urgent: Body = {"prompt": token_ids(700), "max_tokens": 20}
    expected = [await reference(body) for body in (*running, *waiting, urgent)]
    async with streaming(client, running, 10) as streams:
        queued = [Stream(client, body) for body in waiting]
        seen = await client.until(lambda cluster: in_line(cluster) + at_instances(cluster) == 6)
        assert at_instances(seen) <= 1 if policy == "llumnix" else in_line(seen) == 0
        if how == "body":
            first = Stream(client, urgent | {"priority": -1})
        else:
            first = Stream(client, urgent, {"X-Vllm-Priority": "-1"})
        ours = await answers([*streams, *queued, first])
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    overtaken = sum(stream.first_token_at > first.first_token_at for stream in queued)
    waiting_then = sum(stream.first_token_at > first.accepted_at for stream in queued)
    # Those that come to an instance's step at the same moment go before it.
    assert overtaken >= waiting_then - (2 if policy == "llumnix" else 3)
    assert waiting_then > 2, "nobody waited when the urgent one came"


def in_line(cluster: dict[str, Any]) -> int:
    return int(cluster["waiting_line"]["requests"])


def at_instances(cluster: dict[str, Any]) -> int:
    return sum(row["waiting"] for row in cluster["instances"])
