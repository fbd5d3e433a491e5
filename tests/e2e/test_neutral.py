"""Two neutral instances: no hand-offs, but everything moves by hand; and a door that closes early."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from completion_client import CompletionClient
from conftest import Reference, run_cluster
from prompts import token_ids
from server_process import ServerProcess
from test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--neutral", "2", "--no-enable-prefix-caching", "--max-waiting-requests", "2")
    with run_cluster(logs / "neutral.log", *flags) as server:
        yield server


async def test_instances(client: CompletionClient) -> None:
    instances = (await client.cluster())["instances"]
    assert [instance["role"] for instance in instances] == ["neutral", "neutral"]


@pytest.mark.parametrize("length", [1, 700])
async def test_no_hand_offs(client: CompletionClient, reference: Reference, length: int) -> None:
    body = {"prompt": token_ids(length), "max_tokens": 150}
    assert_same(await client.stream(body), await reference(body))
    answer = await client.stream(body, client.wander(random.Random(length)))
    assert_same(answer, await reference(body))
    assert any(move.done for move in answer.moves)
    migrations = (await client.cluster())["migrations"]
    assert migrations["handoff"] == {"committed": 0, "aborted": 0}
    assert migrations["manual"]["committed"] > 0


async def test_overload_is_refused_at_the_door(client: CompletionClient, reference: Reference) -> None:
    bodies = [{"prompt": token_ids(3000, i), "max_tokens": 20} for i in range(10)]

    async def ask(number: int) -> bool:
        try:
            answer = await client.stream(bodies[number])
        except httpx.HTTPStatusError as error:
            response = error.response
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["code"] == 429
            return False
        assert_same(answer, await reference(bodies[number]))
        return True

    served = await asyncio.gather(*map(ask, range(10)))
    assert 0 < sum(served) < 10
    body = {"prompt": token_ids(10), "max_tokens": 20}
    assert_same(await client.answer(body), await reference(body))


@pytest.mark.parametrize(
    ("request_id", "destination", "says"),
    [("unknown", "neutral-0", "no running request 'unknown'"), ("", "neutral-9", "no instance 'neutral-9'")],
)
async def test_migrate_what_is_not_there(
    client: CompletionClient, request_id: str, destination: str, says: str
) -> None:
    async with client.open({"prompt": [65], "max_tokens": 500}, "present") as events:
        await anext(events)
        move = await client.migrate(request_id or "present", destination)
    assert move.status == 404
    assert says in move.body["error"]["message"]


async def test_migrate_to_where_it_is(client: CompletionClient) -> None:
    """One of the two instances has it already, the other does not."""
    async with client.open({"prompt": [65], "max_tokens": 1500}, "mine") as events:
        await anext(events)
        first, second = [await client.migrate("mine", place) for place in client.instances]
    assert 409 in (first.status, second.status)
    assert 200 in (first.status, second.status)
