"""Prompts have the lengths that are planned, and repeat where the trace says so."""

import string

from loadtests.arrival_plan import PlannedRequest
from loadtests.prompt_maker import PromptMaker

LETTERS = string.ascii_lowercase
MAKER = PromptMaker([ord(letter) for letter in LETTERS], LETTERS, chat_overhead=4, seed=0)


def request(number: int, prompt_tokens: int, segments: tuple[int, ...] = ()) -> PlannedRequest:
    return PlannedRequest(number, 0.0, "chat", prompt_tokens, 10, segments=segments)


def test_lengths() -> None:
    for tokens in (1, 511, 512, 513, 3000):
        assert len(MAKER.token_ids(request(0, tokens, (1, 2)))) == tokens
        assert len(MAKER.message(request(0, tokens))) == max(1, tokens - 4)


def test_equal_beginnings_are_equal_tokens() -> None:
    one = MAKER.token_ids(request(1, 1100, (7, 8, 9)))
    two = MAKER.token_ids(request(2, 1100, (7, 5, 9)))
    assert one[:512] == two[:512]
    assert one[512:1024] != two[512:1024]
    assert one[1024:] == two[1024:]


def test_what_is_not_shared_differs_by_request_and_seed() -> None:
    other = PromptMaker([ord(letter) for letter in LETTERS], LETTERS, chat_overhead=4, seed=1)
    assert MAKER.token_ids(request(1, 50)) == MAKER.token_ids(request(1, 50))
    assert MAKER.token_ids(request(1, 50)) != MAKER.token_ids(request(2, 50))
    assert MAKER.token_ids(request(1, 50)) != other.token_ids(request(1, 50))
    assert MAKER.message(request(1, 50)) == bytes(MAKER.token_ids(request(1, 46))).decode()
