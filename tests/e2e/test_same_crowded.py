"""Many requests at once, and one request in many places: still what plain vLLM answers to each alone."""

import asyncio
import random

import pytest

from tests.e2e.completion_client import Body, CompletionClient, Move, Progress
from tests.e2e.conftest import Reference
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


def crowd(seed: int) -> list[Body]:
    """32 requests of all sizes, half of them sampled.

    Those are no longer than a chunk: plain vLLM on a CPU dies of a longer prompt with a seed.
    """
    rng = random.Random(seed)
    bodies: list[Body] = []
    for index in range(32):
        length = rng.randrange(1, 500 if index % 2 else 700)
        body: Body = {"prompt": token_ids(length, index), "max_tokens": rng.randrange(20, 80)}
        bodies.append(body | ({"temperature": 1, "seed": index} if index % 2 else {}))
    return bodies


async def test_a_request_moved_eleven_times_has_plain_vllms_answer(
    client: CompletionClient, reference: Reference
) -> None:
    body = {"prompt": token_ids(200), "max_tokens": 500}
    places = ["decode-0", "decode-1"] * 6  # it is on one of them
    answer = await client.stream(body, client.tour(places))
    assert {move.status for move in answer.moves} == {200}
    assert len(answer.moves) >= 11
    assert_same(answer, await reference(body))


async def test_32_moving_requests_have_plain_vllms_answers(
    client: CompletionClient, reference: Reference
) -> None:
    bodies = crowd(1)
    expected = [await reference(body) for body in bodies]
    answers = await asyncio.gather(
        *(client.stream(body, client.wander(random.Random(i), 0.05)) for i, body in enumerate(bodies))
    )
    for answer, theirs in zip(answers, expected, strict=True):
        assert_same(answer, theirs)
    assert sum(move.done for answer in answers for move in answer.moves) >= 32


async def test_chunked_prompts_leave_seeded_answers_unchanged(
    client: CompletionClient, reference: Reference
) -> None:
    """A burst fills the steps of the prefill instance, so that prompts are cut; each alone is not."""
    bodies = [
        {"prompt": token_ids(300, i), "max_tokens": 30, "temperature": 1, "seed": i, "logprobs": 0}
        for i in range(8)
    ]
    expected = [await reference(body) for body in bodies]
    for answer, theirs in zip(await asyncio.gather(*map(client.stream, bodies)), expected, strict=True):
        assert_same(answer, theirs)


async def test_a_stop_string_is_found_across_migrations(
    client: CompletionClient, reference: Reference
) -> None:
    prompt = token_ids(60)
    text = (await reference({"prompt": prompt, "max_tokens": 300})).only.text
    begin, end = 150, 200
    stop = text[begin:end]
    assert text.index(stop) == begin
    body = {"prompt": prompt, "max_tokens": 300, "stop": [stop]}
    expected = await reference(body)
    assert (expected.only.finish_reason, expected.only.stop_reason) == ("stop", stop)
    answer = await client.stream(body, client.wander(random.Random(1)))
    assert_same(answer, expected)
    outputs = [move.body["tokens"] + 1 - len(prompt) for move in answer.moves if move.done]
    assert any(begin < tokens < end for tokens in outputs), f"no migration inside the stop string: {outputs}"


async def test_choices_of_one_request_move_independently(
    client: CompletionClient, reference: Reference
) -> None:
    """n = 2: each choice is a request of its own to the engines."""
    body = {"prompt": token_ids(90), "max_tokens": 250, "n": 2, "temperature": 1, "seed": 3}

    async def move(progress: Progress) -> list[Move]:
        moves: list[Move] = []
        await progress.reached(40)
        asked = await client.migrate(progress.request_id, "decode-0")
        assert asked.status == 409
        children = asked.body["error"]["message"].rpartition(": ")[2].split(", ")
        assert len(children) == 2
        rng = random.Random(5)
        while not progress.ended:
            moves.append(await client.migrate(rng.choice(children), rng.choice(client.instances)))
            await asyncio.sleep(0.002)
        return moves

    answer = await client.stream(body, move)
    assert_same(answer, await reference(body))
    assert sum(move.done for move in answer.moves) >= 4


async def test_chat_has_plain_vllms_answer(client: CompletionClient, reference: Reference) -> None:
    """The other route, not streamed, by text."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Where does the cache live?"}],
        "max_completion_tokens": 80,
        "temperature": 0,
        "logprobs": True,
    }
    async with reference.new_client() as plain:
        ours, theirs = [
            (await http.post("/v1/chat/completions", json=body)).json() for http in (client.http, plain)
        ]
    assert ours["choices"][0]["message"] == theirs["choices"][0]["message"]
    assert ours["usage"] == theirs["usage"]
