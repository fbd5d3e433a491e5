"""A decode pool that is too small, with prefix caching; then its instances die one by one."""

import asyncio
import itertools
import os
import random
import signal
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

DECODE = ["decode-0", "decode-1"]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """A decode instance has 35 usable blocks of 32 tokens; a request takes up to 32."""
    flags = ("--prefill", "1", "--decode", "2", "--max-model-len", "1024", "--enable-prefix-caching")
    flags += ("--no-replace",)
    few_blocks = ("--decode-kv-cache-memory-bytes", str(36 * 2**17))
    with run_cluster(logs / "scarcity.log", *flags, *few_blocks) as server:
        yield server


async def test_blocks_present_at_the_destination_are_not_copied(
    client: CompletionClient, reference: Reference
) -> None:
    """A second request with the same 20 blocks in front, and one that comes back, bring little along."""
    copied = []
    for tail in range(2):
        body = {"prompt": token_ids(640) + token_ids(20, tail), "max_tokens": 150}
        answer = await client.stream(body, client.tour([*DECODE, DECODE[0]]))  # it is on one of them
        assert_same(answer, await reference(body))
        assert {move.status for move in answer.moves} == {200}
        copied.append([move.body["blocks"] for move in answer.moves])
    first, second = copied
    assert max(first) > 20 > 15 > first[-1]  # the last one is where it was before
    assert max(second) < 15


async def test_the_prefill_instance_decodes_until_there_is_room(
    client: CompletionClient, reference: Reference
) -> None:
    """Three requests on each leave 20 blocks of an instance, and a late one needs 25. It comes there when
    they have ended, long before itself."""
    fillers: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 160} for i in range(6)]
    late: list[Body] = [{"prompt": token_ids(800, i), "max_tokens": 200} for i in range(2)]
    expected = [await reference(body) for body in fillers + late]
    async with streaming(client, fillers, 60) as first, streaming(client, late, 1) as second:
        ours = await answers([*first, *second])
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    for answer in ours[len(fillers) :]:
        assert await client.handed_off(answer.request_id), "it waited and was never handed off"
    refused = [
        move
        for answer in ours[len(fillers) :]
        for timeline in await client.timelines(answer.request_id)
        for move in timeline["migrations"]
        if move["outcome"] == "aborted"
    ]
    assert refused, "the decode instances had room all the time"


async def test_preempted_and_moving_requests_have_plain_vllms_answers(
    client: CompletionClient, reference: Reference
) -> None:
    """Decode instances take more than they can finish at once: requests are preempted, also while moving.

    The two take 14 requests of 5 blocks, which become 10; the prefill instance would have room for all.
    """
    client.instances = DECODE
    bodies: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 200} for i in range(12)]
    expected = [await reference(body) for body in bodies]
    before = await client.metric("vllm:num_preemptions_total")
    ours = await asyncio.gather(
        *(client.stream(body, client.wander(random.Random(i), 0.2)) for i, body in enumerate(bodies))
    )
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    assert any(move.done for answer in ours for move in answer.moves)
    assert await client.metric("vllm:num_preemptions_total") > before, "nothing was preempted"


async def kill(client: CompletionClient, name: str) -> None:
    os.kill(await pid_of(client, name), signal.SIGKILL)


async def pid_of(client: CompletionClient, name: str) -> int:
    (pid,) = [i["pid"] for i in (await client.cluster())["instances"] if i["id"] == name]
    return int(pid)


async def stop_with_requests(client: CompletionClient, name: str, streams: list[Stream]) -> None:
    """Stops an instance (SIGSTOP) while some of these requests are there, so that none can leave."""
    pid = await pid_of(client, name)
    async with asyncio.timeout(60):
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.3)  # what it has sent arrives
            rows = [await client.timelines(stream.progress.request_id) for stream in streams]
            if any(row["instance"] == name for row in itertools.chain(*rows)):
                return
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.1)


async def gone(client: CompletionClient, name: str) -> None:
    await client.until(lambda cluster: name not in [row["id"] for row in cluster["instances"]])


def on(name: str, cluster: dict[str, Any]) -> int:
    """How many requests an instance decodes."""
    return sum(row["running"] for row in cluster["instances"] if row["id"] == name)


def mixed(count: int) -> list[Body]:
    """Greedy and sampled, short and long prompts."""
    rng = random.Random(4)
    bodies: list[Body] = []
    for index in range(count):
        body: Body = {"prompt": token_ids(rng.randrange(1, 200), index), "max_tokens": 220}
        bodies.append(body | ({"temperature": 1, "seed": index} if index % 2 else {}))
    return bodies


async def test_requests_survive_a_decode_instance_that_dies_amid_migrations(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = mixed(6)
    expected = [await reference(body) for body in bodies]
    recomputed = await client.metric("pd_serve_recomputed_requests_total")
    async with streaming(client, bodies, 10, client.wander(random.Random(6))) as streams:
        await stop_with_requests(client, "decode-1", streams)
        await kill(client, "decode-1")
        ours = await answers(streams)
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    assert await client.metric("pd_serve_recomputed_requests_total") > recomputed
    await gone(client, "decode-1")
    assert_same(await client.stream(bodies[0]), expected[0])


async def test_without_prefill_instances_decode_instances_take_new_requests(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = [{"prompt": token_ids(100, i), "max_tokens": 150} for i in range(3)]
    expected = [await reference(body) for body in bodies]

    async with streaming(client, bodies, 10) as streams:
        await client.until(lambda cluster: on("decode-0", cluster) == 3)
        await kill(client, "prefill-0")
        await gone(client, "prefill-0")
        assert_same(await client.stream(bodies[0]), expected[0])
        ours = await answers(streams)
    for answer, theirs in zip(ours, expected, strict=True):
        assert_same(answer, theirs)
    assert (await client.http.get("/health")).status_code == 200
    assert [instance["id"] for instance in (await client.cluster())["instances"]] == ["decode-0"]
