"""The simulated model: every block counts, and where it is."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.simulated_engine.contents import (
    MASK,
    OutputCheck,
    SegmentPrompt,
    TokenPrompt,
    expected_output,
    kv_of,
    sampled_token,
)

BLOCK = 4

prompts = st.lists(st.integers(0, 1 << 16), min_size=1, max_size=40)


@given(prompts, st.integers(1, 12))
def test_the_output_does_not_depend_on_the_size_of_the_blocks(prompt: list[int], num_tokens: int) -> None:
    outputs = {tuple(expected_output(TokenPrompt(prompt), num_tokens, size)) for size in (1, 4, 16)}

    assert len(outputs) == 1


@given(prompts, prompts, st.integers(8, 12))
def test_other_prompts_have_other_outputs(one: list[int], other: list[int], num_tokens: int) -> None:
    """Eight tokens of 16 bits: that two are equal by chance does not happen."""
    outputs = [expected_output(TokenPrompt(prompt), num_tokens, BLOCK) for prompt in (one, other)]

    assert (outputs[0] == outputs[1]) == (one == other)


@given(prompts, st.integers(1, 40), st.lists(st.integers(1, 40), max_size=5))
def test_a_check_takes_the_output_in_any_pieces(prompt: list[int], num_tokens: int, cuts: list[int]) -> None:
    output = expected_output(TokenPrompt(prompt), num_tokens, BLOCK)
    check = OutputCheck(TokenPrompt(prompt), BLOCK, sampled=False)
    ends = sorted({0, *cuts, num_tokens})

    assert [check.take(output[begin:end]) for begin, end in pairwise(ends)] == [None] * (len(ends) - 1)


@given(prompts, st.integers(0, 19), st.integers(1, (1 << 16) - 1))
def test_a_check_finds_the_first_wrong_token(prompt: list[int], index: int, bits: int) -> None:
    output = expected_output(TokenPrompt(prompt), 20, BLOCK)
    output[index] ^= bits

    assert OutputCheck(TokenPrompt(prompt), BLOCK, sampled=False).take(output) == index


def sampled_output(prompt: list[int], epoch: int, begin: list[int], num_tokens: int) -> list[int]:
    """What the copy of this epoch generates after these tokens."""
    output = list(begin)
    while len(output) < num_tokens:
        [token] = expected_output(TokenPrompt(prompt + output), 1, BLOCK)
        output.append(sampled_token(token, epoch, len(output)))
    return output


def test_copies_of_a_sampled_request_differ_and_each_follows_from_its_beginning() -> None:
    prompt = [1, 2, 3]
    first = sampled_output(prompt, 0, [], 20)
    second = sampled_output(prompt, 1000, first[:7], 20)

    assert first != second
    for output in (first, second):
        assert OutputCheck(TokenPrompt(prompt), BLOCK, sampled=True).take(output) is None


def test_a_mixture_of_two_copies_of_a_sampled_request_is_found() -> None:
    prompt = [1, 2, 3]
    copies = [sampled_output(prompt, epoch, [], 20) for epoch in (0, 1000)]

    mixed = copies[0][:10] + copies[1][10:]

    assert OutputCheck(TokenPrompt(prompt), BLOCK, sampled=True).take(mixed) == 10


@pytest.mark.parametrize("change", ["swap tokens", "drop a token", "move a block"])
def test_misplaced_contents_are_other_contents(change: str) -> None:
    tokens = list(range(100, 116))
    changed = {
        "swap tokens": [tokens[1], tokens[0], *tokens[2:]],
        "drop a token": tokens[:-1],
        "move a block": tokens[4:8] + tokens[:4] + tokens[8:],
    }[change]

    def digest(ids: list[int]) -> int:
        return sum(kv_of(position, token) for position, token in enumerate(ids)) & MASK

    assert digest(tokens) != digest(changed)


def test_prompts_share_what_their_segments_share() -> None:
    one, other = (SegmentPrompt(40, segments, 16, seed=seed) for seed, segments in ((1, (7, 8)), (2, (7, 9))))

    def contents(prompt: SegmentPrompt) -> list[int]:
        return [prompt.content(block, BLOCK, BLOCK) for block in range(10)]

    same = [a == b for a, b in zip(contents(one), contents(other), strict=True)]
    assert same == [True] * 4 + [False] * 6  # 16 tokens of segment 7; then other segments; then other seeds


def test_a_partly_filled_block_is_another_content() -> None:
    prompt = SegmentPrompt(40, (), 16, seed=1)

    assert len({prompt.content(2, n, BLOCK) for n in range(1, BLOCK + 1)}) == BLOCK
