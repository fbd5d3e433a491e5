"""What a client gets does not depend on where its request was computed: it is what plain vLLM answers."""

import random
from typing import Any

import pytest

from tests.e2e.completion_client import Answer, CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

LENGTHS = [1, 31, 32, 33, 64, 500, 1000, 2500, 4000]


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


def assert_same(ours: Answer, theirs: Answer) -> None:
    assert ours.choices.keys() == theirs.choices.keys()
    for index, expected in theirs.choices.items():
        choice = ours.choices[index]
        assert choice.token_ids == expected.token_ids
        assert choice.text == expected.text
        assert choice.finish_reason == expected.finish_reason
        assert choice.stop_reason == expected.stop_reason
        assert choice.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert len(choice.top_logprobs) == len(expected.top_logprobs)
        for top, expected_top in zip(choice.top_logprobs, expected.top_logprobs, strict=True):
            assert top == pytest.approx(expected_top, abs=1e-4)
        if choice.prompt_logprobs is not None:  # a streamed answer has none
            assert _numbers(choice.prompt_logprobs) == pytest.approx(
                _numbers(expected.prompt_logprobs), abs=1e-4
            )
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert ours.usage[count] == theirs.usage[count]


def _numbers(prompt_logprobs: list[Any] | None) -> dict[tuple[int, str], float]:
    rows = enumerate(prompt_logprobs or [])
    return {(row, token): entry["logprob"] for row, top in rows for token, entry in (top or {}).items()}


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_handed_off_request_has_plain_vllms_answer(
    client: CompletionClient, reference: Reference, length: int
) -> None:
    body = {"prompt": token_ids(length), "max_tokens": 100}
    answer = await client.stream(body)
    assert_same(answer, await reference(body))
    assert len(await client.handed_off(answer.request_id)) == 1


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_request_migrated_at_random_moments_has_plain_vllms_answer(
    client: CompletionClient, reference: Reference, length: int
) -> None:
    rng = random.Random(length)
    body = {"prompt": token_ids(length), "max_tokens": 100}
    answer = await client.stream(body, client.at(sorted(rng.sample(range(1, 90), 6)), rng))
    assert_same(answer, await reference(body))
    assert any(move.done for move in answer.moves)
