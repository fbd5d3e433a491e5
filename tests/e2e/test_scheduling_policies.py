"""Two neutral instances under each of two policies, and a door that closes early. Engines are simulated."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.connections import LIMITS
from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import TIMEOUT, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.simulated import simulated_answer
from tests.e2e.streams import Stream, answers, streaming
from tests.e2e.test_same_output import assert_same

#: A request that waits for room is bound to an instance after 15 s, unless that is sooner: here nothing lasts
#: as long.
SETTINGS = {
    "llumnix": ("--policy", "llumnix", "--set", "bind_after_s=0.2"),
    "infaas++": ("--policy", "infaas++"),
}

MAX_WAITING = 8

BOUND_S = 60.0

#: Two of them fill an instance for half a minute, so that none of `BEHIND` fits.
FILLING: list[Body] = [{"prompt": token_ids(4900, i), "max_tokens": 800} for i in range(4)]
BEHIND: list[Body] = [{"prompt": token_ids(4400, i), "max_tokens": 20} for i in range(MAX_WAITING + 4)]

with_any_policy = pytest.mark.parametrize("policy", ["llumnix", "infaas++"], indirect=True)
with_default_policy = pytest.mark.parametrize("policy", ["llumnix"], indirect=True)


@pytest.fixture(scope="module")
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(logs: Path, policy: str) -> Iterator[ServerProcess]:
    """An instance has 780 blocks of 16 tokens, 773 of which are for new requests. A token takes 40 ms."""
    flags = ("--engine", "simulated", "--neutral", "2", "--max-waiting-requests", str(MAX_WAITING))
    with run_cluster(logs / f"{policy}.log", *flags, *SETTINGS[policy]) as server:
        yield server


@with_any_policy
async def test_defragmentation_makes_room_for_a_large_request(client: CompletionClient, policy: str) -> None:
    """Both instances have 470 blocks free, and 494 are needed: one instance has to make room for it.

    With `llumnix` it waits in the line first, then at the instance that gives requests away.
    """
    blocking: list[Body] = [{"prompt": token_ids(2400, i), "max_tokens": 250} for i in range(4)]
    large: Body = {"prompt": token_ids(7900), "max_tokens": 20}
    async with streaming(client, blocking, 20) as streams:
        batches = [row["running"] for row in (await client.cluster())["instances"]]
        assert batches == [2, 2]
        last = Stream(client, large)
        ours = [*await answers(streams), await last.answer]
    for body, answer in zip((*blocking, large), ours, strict=True):
        assert_same(answer, simulated_answer(body))
    waited_for = sum(stream.last_token_at < last.first_token_at for stream in streams)
    moved = (await client.cluster())["migrations"].get("defragment", {"committed": 0})["committed"]
    if policy == "llumnix":
        assert (waited_for, moved > 0) == (0, True)
    else:
        assert (waited_for > 0, moved) == (True, 0)


@with_any_policy
async def test_a_high_priority_request_overtakes_waiting_ones(client: CompletionClient, policy: str) -> None:
    """Four requests fill both instances and six wait; what comes last goes first.

    It says so in its body, or in a header.

    With `llumnix` they wait in one line, but for the one that is bound to an instance meanwhile.
    """
    running: list[Body] = [{"prompt": token_ids(4900, i), "max_tokens": 150} for i in range(4)]
    waiting: list[Body] = [{"prompt": token_ids(4400, i), "max_tokens": 20} for i in range(6)]
    urgent: Body = {"prompt": token_ids(3800), "max_tokens": 20}
    async with streaming(client, running, 10) as streams:
        queued = [Stream(client, body) for body in waiting]
        seen = await client.until(lambda cluster: in_line(cluster) + at_instances(cluster) == 6)
        assert at_instances(seen) <= 1 if policy == "llumnix" else in_line(seen) == 0
        if policy == "infaas++":
            first = Stream(client, urgent | {"priority": -1})
        else:
            first = Stream(client, urgent, {"X-Vllm-Priority": "-1"})
        ours = await answers([*streams, *queued, first])
    for body, answer in zip((*running, *waiting, urgent), ours, strict=True):
        assert_same(answer, simulated_answer(body))
    overtaken = sum(stream.first_token_at > first.first_token_at for stream in queued)
    waiting_then = sum(stream.first_token_at > first.accepted_at for stream in queued)
    # Those that come to an instance's step at the same moment go before it, and so does one that is bound.
    assert overtaken >= waiting_then - 3
    assert waiting_then > 3, "no other request waited when the urgent one came"


def in_line(cluster: dict[str, Any]) -> int:
    return int(cluster["waiting_line"]["requests"])


def at_instances(cluster: dict[str, Any]) -> int:
    return sum(row["waiting"] for row in cluster["instances"])


@with_default_policy
async def test_requests_are_migrated_by_hand_and_never_handed_off(client: CompletionClient) -> None:
    body: Body = {"prompt": token_ids(700), "max_tokens": 100}
    answer = await client.stream(body, client.wander(random.Random(700)))
    assert_same(answer, simulated_answer(body))
    assert any(move.done for move in answer.moves)
    cluster = await client.cluster()
    assert [instance["role"] for instance in cluster["instances"]] == ["neutral", "neutral"]
    assert cluster["migrations"]["handoff"] == {"committed": 0, "aborted": 0}


@with_default_policy
async def test_requests_beyond_the_waiting_limit_get_429(client: CompletionClient) -> None:
    refused = asyncio.Event()

    async def ask(body: Body) -> bool:
        try:
            answer = await client.stream(body)
        except httpx.HTTPStatusError as error:
            response = error.response
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["code"] == 429
            refused.set()
            return False
        assert_same(answer, simulated_answer(body))
        return True

    async with streaming(client, FILLING, 1):
        asked = asyncio.gather(*map(ask, BEHIND))
        await asyncio.wait_for(refused.wait(), BOUND_S)
    assert MAX_WAITING <= sum(await asked) < len(BEHIND)


@with_default_policy
async def test_a_client_that_tries_again_is_served(client: CompletionClient) -> None:
    """openai-python waits as long as `Retry-After` says."""
    statuses: list[int] = []
    refused = asyncio.Event()

    async def note(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            refused.set()

    http = httpx.AsyncClient(event_hooks={"response": [note]}, timeout=TIMEOUT, limits=LIMITS)
    async with openai.AsyncOpenAI(
        base_url=f"{client.http.base_url}/v1", api_key="none", http_client=http, max_retries=1000
    ) as patient:

        async def ask(body: Body, asking: openai.AsyncOpenAI) -> int:
            answer = await asking.completions.create(model="tiny", **body)
            return answer.usage.completion_tokens if answer.usage else 0

        impatient = patient.with_options(max_retries=0)
        async with streaming(client, FILLING, 1):
            asked = asyncio.gather(*(ask(body, impatient) for body in BEHIND), return_exceptions=True)
            await asyncio.wait_for(refused.wait(), BOUND_S)
        errors = [answer for answer in await asked if answer != 20]
        assert {type(error) for error in errors} == {openai.RateLimitError}
        assert statuses.count(429) == len(errors)

        statuses.clear()
        refused.clear()
        async with streaming(client, FILLING, 1):
            served = asyncio.gather(*(ask(body, patient) for body in BEHIND))
            await asyncio.wait_for(refused.wait(), BOUND_S)
        assert await served == [20] * len(BEHIND)
        assert statuses.count(200) == len(BEHIND)


@with_default_policy
@pytest.mark.parametrize(
    ("request_id", "destination", "says"),
    [("unknown", "neutral-0", "no running request 'unknown'"), ("", "neutral-9", "no instance 'neutral-9'")],
)
async def test_migrating_an_unknown_request_or_to_an_unknown_instance_is_404(
    client: CompletionClient, request_id: str, destination: str, says: str
) -> None:
    async with client.open({"prompt": [65], "max_tokens": 500}, "present") as events:
        await anext(events)
        move = await client.migrate(request_id or "present", destination)
    assert move.status == 404
    assert says in move.body["error"]["message"]


@with_default_policy
async def test_migrating_a_request_to_its_own_instance_is_409(client: CompletionClient) -> None:
    """One of the two instances has it already, the other does not."""
    async with client.open({"prompt": [65], "max_tokens": 1500}, "mine") as events:
        await anext(events)
        first, second = [await client.migrate("mine", place) for place in client.instances]
    assert 409 in (first.status, second.status)
    assert 200 in (first.status, second.status)
