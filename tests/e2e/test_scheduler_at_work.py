"""The scheduler over a small decode pool of simulated engines: it balances, it drains, it may die."""

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import Stream, answers, streaming
from tests.e2e.test_same_output import assert_same

#: What was lost with an instance goes on when that has been silent for 30 s: a stream that was moved does not
#: come near it, on whatever machine.
LONGEST_GAP_S = 10.0


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


def instance(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [row for row in cluster["instances"] if row["id"] == name]
    return dict(found)


def moved_by_the_scheduler(cluster: dict[str, Any]) -> int:
    reasons = ("balance", "defragment")
    return sum(cluster["migrations"].get(reason, {"committed": 0})["committed"] for reason in reasons)


def moved_by_drains(cluster: dict[str, Any]) -> int:
    return int(cluster["migrations"].get("drain", {"committed": 0})["committed"])


def is_empty(row: dict[str, Any]) -> bool:
    return not any(row[count] for count in ("running", "waiting", "migrating_in", "migrating_out"))


async def pile_up(client: CompletionClient, streams: list[Stream], place: str) -> None:
    """Moves all of them to one instance, while the scheduler may move some of them away."""
    for stream in streams:
        for _ in range(200):
            move = await client.migrate(stream.progress.request_id, place)
            if move.done or f"on {place} already" in str(move.body):
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError(f"not to {place}: {move.body}")


async def assert_balanced(client: CompletionClient) -> None:
    """Five requests of 144 blocks, which become 156, are too many for one instance of 780."""
    bodies: list[Body] = [{"prompt": token_ids(2300, i), "max_tokens": 180} for i in range(5)]
    expected = list(map(simulated_answer, bodies))
    async with streaming(client, bodies, 20) as streams:
        before = moved_by_the_scheduler(await client.cluster())
        await pile_up(client, streams, "decode-0")
        await client.until(
            lambda cluster: (
                moved_by_the_scheduler(cluster) > before and instance(cluster, "decode-1")["running"] > 0
            )
        )
        assert not all(stream.answer.done() for stream in streams)
        ours = await answers(streams)
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)


async def test_the_scheduler_moves_requests_off_a_crowded_instance(client: CompletionClient) -> None:
    await assert_balanced(client)


async def test_a_drained_instance_becomes_empty_by_migrations(client: CompletionClient) -> None:
    bodies: list[Body] = [{"prompt": token_ids(200, i), "max_tokens": 200} for i in range(3)]
    expected = list(map(simulated_answer, bodies))
    async with streaming(client, bodies, 30) as streams:
        await pile_up(client, streams[:2], "decode-0")
        before = moved_by_drains(await client.cluster())
        await client.drain("decode-0")
        cluster = await client.until(
            lambda cluster: (
                instance(cluster, "decode-0")["draining"] and is_empty(instance(cluster, "decode-0"))
            )
        )
        assert instance(cluster, "decode-0")["state"] == "draining"
        assert moved_by_drains(cluster) > before, "it was empty because they had ended"
        late = Stream(client, bodies[0])  # decodes elsewhere
        ours = await answers(streams)
        assert_same(await late.answer, expected[0])
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    assert max(stream.progress.longest_gap_s for stream in streams) < LONGEST_GAP_S
    assert is_empty(instance(await client.cluster(), "decode-0"))
    await client.drain("decode-0", draining=False)
    await client.until(lambda cluster: instance(cluster, "decode-0")["state"] == "ready")


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [("decode-9", 404, "no instance 'decode-9'"), ("prefill-0", 409, "the last instance that takes new")],
)
async def test_an_impossible_drain_is_refused_with_its_reason(
    client: CompletionClient, name: str, status: int, says: str
) -> None:
    response = await client.http.post("/cluster/drain", json={"instance": name})
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


async def test_streams_go_on_while_a_dead_scheduler_is_replaced(client: CompletionClient) -> None:
    """No stream stops, and the next one balances as the first."""
    bodies: list[Body] = [{"prompt": token_ids(50, i), "max_tokens": 150} for i in range(4)]
    expected = list(map(simulated_answer, bodies))
    async with streaming(client, bodies, 10) as streams:
        before = (await client.cluster())["scheduler"]
        os.kill(before["pid"], signal.SIGKILL)
        ours = await answers(streams)
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    assert max(stream.progress.longest_gap_s for stream in streams) < LONGEST_GAP_S
    cluster = await client.until(
        lambda cluster: (
            cluster["scheduler"]["state"] == "alive" and cluster["scheduler"]["pid"] != before["pid"]
        )
    )
    assert cluster["scheduler"]["restarts"] == before["restarts"] + 1
    await assert_balanced(client)
