"""Prompts have the planned lengths, and share beginnings where the trace has them."""

import string

from loadtests.prompts import PromptMaker
from loadtests.workload import PlannedRequest

LETTERS = string.ascii_lowercase
MAKER = PromptMaker([ord(letter) for letter in LETTERS], LETTERS, chat_overhead=4, seed=0)


def request(number: int, prompt_tokens: int, segments: tuple[int, ...] = ()) -> PlannedRequest:
    return PlannedRequest(number, 0.0, "chat", prompt_tokens, 10, segments=segments)


def test_prompts_have_the_planned_lengths() -> None:
    for tokens in (1, 511, 512, 513, 3000):
        assert len(MAKER.token_ids(request(0, tokens, (1, 2)))) == tokens
        assert len(MAKER.message(request(0, tokens))) == max(1, tokens - 4)


def test_equal_segments_give_equal_tokens() -> None:
    one = MAKER.token_ids(request(1, 1100, (7, 8, 9)))
    two = MAKER.token_ids(request(2, 1100, (7, 5, 9)))
    assert one[:512] == two[:512]
    assert one[512:1024] != two[512:1024]
    assert one[1024:] == two[1024:]


def test_tokens_outside_segments_differ_by_request_and_seed() -> None:
    other = PromptMaker([ord(letter) for letter in LETTERS], LETTERS, chat_overhead=4, seed=1)
    assert MAKER.token_ids(request(1, 50)) == MAKER.token_ids(request(1, 50))
    assert MAKER.token_ids(request(1, 50)) != MAKER.token_ids(request(2, 50))
    assert MAKER.token_ids(request(1, 50)) != other.token_ids(request(1, 50))
    assert MAKER.message(request(1, 50)) == bytes(MAKER.token_ids(request(1, 46))).decode()
