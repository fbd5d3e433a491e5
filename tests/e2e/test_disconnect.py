"""A client that goes away takes its request with it, wherever that is at the moment."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.e2e.completion_client import Body, CompletionClient, Move
from tests.e2e.conftest import Reference, assert_at_rest
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same

LONG: Body = {"prompt": token_ids(7000), "max_tokens": 100}


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


@pytest.fixture(autouse=True)
async def others_go_on(client: CompletionClient, reference: Reference) -> Any:
    """Before the cluster is looked at: another request still gets what it should."""
    yield
    await assert_at_rest(client)
    body = {"prompt": token_ids(40), "max_tokens": 40}
    assert_same(await client.stream(body), await reference(body))


async def begin(client: CompletionClient, body: Body) -> "asyncio.Task[None]":
    """A streaming client; cancelling the task closes its connection."""

    async def read() -> None:
        async with client.open(body) as events:
            async for _ in events:
                pass

    return asyncio.create_task(read())


async def leave(task: "asyncio.Task[None]") -> None:
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(client: CompletionClient, what: Callable[[dict[str, Any]], bool]) -> None:
    """Waits until that is true of the prefill instance."""
    async with asyncio.timeout(90):
        while True:
            instances = (await client.cluster())["instances"]
            if what(next(instance for instance in instances if instance["role"] == "prefill")):
                return
            await asyncio.sleep(0.002)


async def test_instances_are_forked_from_one_process(client: CompletionClient) -> None:
    pids = [instance["pid"] for instance in (await client.cluster())["instances"]]
    parents = [psutil.Process(pid).parent() for pid in pids]
    assert len(pids) == 3
    assert len(set(parents)) == 1
    assert parents[0] is not None
    assert "pd_serve.platform.fork_server" in parents[0].cmdline()


async def test_a_waiting_request_ends_with_its_client(client: CompletionClient) -> None:
    ahead = await begin(client, LONG)
    await until(client, lambda prefill: prefill["running"] > 0)
    behind = await begin(client, LONG)
    await until(client, lambda prefill: prefill["waiting"] > 0)
    await leave(behind)
    await until(client, lambda prefill: prefill["waiting"] == 0)
    await leave(ahead)


async def test_a_request_in_prefill_ends_with_its_client(client: CompletionClient) -> None:
    task = await begin(client, LONG)
    await until(client, lambda prefill: prefill["running"] > 0)
    await leave(task)


async def committed(client: CompletionClient, reason: str) -> int:
    return int((await client.cluster())["migrations"][reason]["committed"])


@pytest.mark.parametrize("length", [20, 1200])
async def test_a_request_ends_with_its_client_at_the_hand_off(client: CompletionClient, length: int) -> None:
    rng = random.Random(length)
    body = {"prompt": token_ids(length), "max_tokens": 500}
    before = await committed(client, "handoff")
    for _ in range(10):
        async with client.open(body) as events:
            async for _ in events:  # the first token leaves when the hand-off completes
                await asyncio.sleep(rng.uniform(0.0, 0.02))
                break
    assert await committed(client, "handoff") > before, "no request was handed off"


async def test_decoding_requests_end_with_their_clients(client: CompletionClient) -> None:
    body = {"prompt": token_ids(50), "max_tokens": 2000}

    async def read() -> None:
        seen = 0
        async with client.open(body) as events:
            async for _ in events:
                seen += 1
                if seen == 60:
                    return

    await asyncio.gather(*(read() for _ in range(8)))


async def test_requests_end_with_their_clients_amid_migrations(client: CompletionClient) -> None:
    """Abort and migration race each other, at every offset.

    Half of the clients leave amid their moves, the others when one of them has committed.
    """
    rng = random.Random(9)
    under_way = 0  # moves that had no answer yet when their client left

    def move_everywhere(request_id: str) -> list[asyncio.Task[Move]]:
        return [asyncio.create_task(client.migrate(request_id, place)) for place in client.instances]

    async def race(number: int) -> int:
        """Returns the number of committed moves."""
        nonlocal under_way
        request_id = f"race-{number}-{rng.random()}"
        seen = 0
        moves: list[asyncio.Task[Move]] = []
        body = {"prompt": token_ids(rng.choice([10, 300, 900]), number), "max_tokens": 2000}
        async with client.open(body, request_id) as events:
            async for _ in events:
                seen += 1
                if seen == 30:
                    moves += move_everywhere(request_id)
                    if number % 2:
                        await asyncio.sleep(rng.uniform(0.0, 0.03))
                    else:
                        while not any(move.done for move in await asyncio.gather(*moves)):
                            moves += move_everywhere(request_id)  # it was on the move for other reasons
                    break
            under_way += sum(not move.done() for move in moves)
        return sum(move.done for move in await asyncio.gather(*moves))

    before = await committed(client, "manual")
    moved = 0
    for number in range(0, 40, 4):
        moved += sum(await asyncio.gather(*(race(number + i) for i in range(4))))
    assert moved >= 20, "a client left before its request was moved"
    assert under_way > 0, "no client left amid a move"
    await client.until(lambda cluster: cluster["migrations"]["manual"]["committed"] >= before + moved)
