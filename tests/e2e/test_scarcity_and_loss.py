"""A decode pool that is too small, with prefix caching; then its instances die one by one."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.completion_client import Answer, Body, CompletionClient, Meanwhile
from tests.e2e.conftest import Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """A decode instance has 71 usable blocks of 32 tokens; a request takes up to 64."""
    flags = ("--prefill", "1", "--decode", "3", "--max-model-len", "2048", "--enable-prefix-caching")
    flags += ("--no-replace",)
    few_blocks = ("--decode-kv-cache-memory-bytes", str(72 * 2**17))
    with run_cluster(logs / "scarcity.log", *flags, *few_blocks) as server:
        yield server


async def handoffs(client: CompletionClient) -> dict[str, int]:
    return dict((await client.cluster())["migrations"]["handoff"])


async def test_blocks_present_at_the_destination_are_not_copied(
    client: CompletionClient, reference: Reference
) -> None:
    """A second request with the same 20 blocks in front, and one that comes back, bring little along."""
    copied = []
    for tail in range(2):
        body = {"prompt": token_ids(640) + token_ids(20, tail), "max_tokens": 300}
        tour = ["decode-0", "decode-1", "decode-2", "decode-0"]  # it is on one of them
        answer = await client.stream(body, client.tour(tour))
        assert_same(answer, await reference(body))
        assert {move.status for move in answer.moves} == {200}
        copied.append([move.body["blocks"] for move in answer.moves])
    first, second = copied
    assert max(first) > 20 > 15 > first[-1]  # the last one is where it was before
    assert max(second) < 15


async def test_the_prefill_instance_decodes_until_there_is_room(
    client: CompletionClient, reference: Reference
) -> None:
    """Three requests make an instance too full for one of the long ones that come then."""
    fillers: list[Body] = [{"prompt": token_ids(100, i), "max_tokens": 400} for i in range(9)]
    late: list[Body] = [{"prompt": token_ids(1700, i), "max_tokens": 340} for i in range(4)]
    expected = [await reference(body) for body in fillers + late]
    before = await handoffs(client)
    async with decoding(client, fillers, 100) as first, decoding(client, late, 1) as second:
        answers = await asyncio.gather(*first, *second)
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)
    after = await handoffs(client)
    assert after["aborted"] > before["aborted"], "the decode instances had room all the time"
    assert after["committed"] > before["committed"] + len(fillers), "those that waited were never handed off"


async def test_preempted_and_moving_requests_have_plain_vllms_answers(
    client: CompletionClient, reference: Reference
) -> None:
    """Decode instances take more than they can finish at once: requests are preempted, also while moving."""
    bodies: list[Body] = [{"prompt": token_ids(200, i), "max_tokens": 400} for i in range(18)]
    expected = [await reference(body) for body in bodies]
    answers = await asyncio.gather(
        *(client.stream(body, client.wander(random.Random(i), 0.2)) for i, body in enumerate(bodies))
    )
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)


@asynccontextmanager
async def decoding(
    client: CompletionClient, bodies: list[Body], tokens: int, meanwhile: Meanwhile | None = None
) -> AsyncIterator[list["asyncio.Task[Answer]"]]:
    """Streams of which each has had so many tokens; they go on."""
    ready = [asyncio.Event() for _ in bodies]

    async def stream(body: Body, seen: asyncio.Event) -> Answer:
        async def wait(progress):  # type: ignore[no-untyped-def]
            await progress.reached(tokens)
            seen.set()
            return await meanwhile(progress) if meanwhile else []

        return await client.stream(body, wait)

    tasks = [asyncio.create_task(stream(body, seen)) for body, seen in zip(bodies, ready, strict=True)]
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(seen.wait() for seen in ready))
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def kill(client: CompletionClient, name: str) -> None:
    (pid,) = [i["pid"] for i in (await client.cluster())["instances"] if i["id"] == name]
    os.kill(pid, signal.SIGKILL)


async def gone(client: CompletionClient, name: str) -> None:
    async with asyncio.timeout(60):
        while any(instance["id"] == name for instance in (await client.cluster())["instances"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def mixed(count: int) -> list[Body]:
    """Greedy and sampled, short and long prompts."""
    rng = random.Random(4)
    bodies: list[Body] = []
    for index in range(count):
        body: Body = {"prompt": token_ids(rng.randrange(1, 400), index), "max_tokens": 250}
        bodies.append(body | ({"temperature": 1, "seed": index} if index % 2 else {}))
    return bodies


async def test_requests_of_a_dead_decode_instance_go_on_elsewhere(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = mixed(6)
    expected = [await reference(body) for body in bodies]
    async with decoding(client, bodies, 30) as streams:
        await kill(client, "decode-2")
        answers = await asyncio.gather(*streams)
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)
    await gone(client, "decode-2")
    assert_same(await client.stream(bodies[0]), expected[0])


async def test_requests_survive_a_decode_instance_that_dies_amid_migrations(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = mixed(6)
    expected = [await reference(body) for body in bodies]
    async with decoding(client, bodies, 10, client.wander(random.Random(6))) as streams:
        await asyncio.sleep(0.1)
        await kill(client, "decode-1")
        answers = await asyncio.gather(*streams)
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)
    await gone(client, "decode-1")


async def test_without_prefill_instances_decode_instances_take_new_requests(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = [{"prompt": token_ids(100, i), "max_tokens": 300} for i in range(3)]
    expected = [await reference(body) for body in bodies]
    before = await handoffs(client)
    async with decoding(client, bodies, 30) as streams:
        async with asyncio.timeout(60):
            while (await handoffs(client))["committed"] < before["committed"] + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await kill(client, "prefill-0")
        await gone(client, "prefill-0")
        assert_same(await client.stream(bodies[0]), expected[0])
        answers = await asyncio.gather(*streams)
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)
    assert (await client.http.get("/health")).status_code == 200
    assert [instance["id"] for instance in (await client.cluster())["instances"]] == ["decode-0"]
