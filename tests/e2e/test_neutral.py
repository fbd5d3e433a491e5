"""Two neutral instances: no hand-offs, but everything moves by hand; and a door that closes early."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import LIMITS, TIMEOUT, Reference, run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--neutral", "2", "--no-enable-prefix-caching", "--max-waiting-requests", "2")
    with run_cluster(logs / "neutral.log", *flags) as server:
        yield server


async def test_all_instances_are_neutral(client: CompletionClient) -> None:
    instances = (await client.cluster())["instances"]
    assert [instance["role"] for instance in instances] == ["neutral", "neutral"]


@pytest.mark.parametrize("length", [1, 700])
async def test_requests_are_migrated_by_hand_and_never_handed_off(
    client: CompletionClient, reference: Reference, length: int
) -> None:
    body = {"prompt": token_ids(length), "max_tokens": 150}
    assert_same(await client.stream(body), await reference(body))
    answer = await client.stream(body, client.wander(random.Random(length)))
    assert_same(answer, await reference(body))
    assert any(move.done for move in answer.moves)
    migrations = (await client.cluster())["migrations"]
    assert migrations["handoff"] == {"committed": 0, "aborted": 0}
    assert migrations["manual"]["committed"] > 0


async def test_requests_beyond_the_waiting_limit_get_429(
    client: CompletionClient, reference: Reference
) -> None:
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


async def test_a_client_that_tries_again_is_served(client: CompletionClient) -> None:
    """openai-python waits as long as `Retry-After` says. Computing a prompt takes longer than sending it."""
    many = 12
    statuses: list[int] = []

    async def note(response: httpx.Response) -> None:
        statuses.append(response.status_code)

    http = httpx.AsyncClient(event_hooks={"response": [note]}, timeout=TIMEOUT, limits=LIMITS)
    async with openai.AsyncOpenAI(
        base_url=f"{client.http.base_url}/v1", api_key="none", http_client=http, max_retries=1000
    ) as patient:

        async def ask(number: int, asking: openai.AsyncOpenAI) -> int:
            answer = await asking.completions.create(
                model="tiny", prompt=token_ids(7000, number), max_tokens=20, extra_body={"ignore_eos": True}
            )
            return answer.usage.completion_tokens if answer.usage else 0

        impatient = patient.with_options(max_retries=0)
        refused = await asyncio.gather(*(ask(n, impatient) for n in range(many)), return_exceptions=True)
        errors = [answer for answer in refused if answer != 20]
        assert {type(error) for error in errors} == {openai.RateLimitError}
        assert statuses.count(429) == len(errors)

        statuses.clear()
        assert await asyncio.gather(*(ask(number, patient) for number in range(many))) == [20] * many
        assert statuses.count(200) == many
        assert 429 in statuses


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


async def test_migrating_a_request_to_its_own_instance_is_409(client: CompletionClient) -> None:
    """One of the two instances has it already, the other does not."""
    async with client.open({"prompt": [65], "max_tokens": 1500}, "mine") as events:
        await anext(events)
        first, second = [await client.migrate("mine", place) for place in client.instances]
    assert 409 in (first.status, second.status)
    assert 200 in (first.status, second.status)
