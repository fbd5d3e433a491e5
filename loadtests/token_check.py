"""Whether a stream says what the model says for its prompt, token by token.

A simulated engine's words are a known function of the prompt's tokens (`pd_serve.simulated_engine.contents`),
so its streams are checked without asking. A real model with greedy sampling is asked again, later.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.streamed_answer import Answer, StreamError
from pd_serve.simulated_engine.contents import TokenPrompt, expected_output

#: Tokens from which no vocabulary can be told reliably.
FEWEST_TOKENS = 48

#: Any: what blocks sum up to does not depend on their size.
_BLOCK_TOKENS = 16

#: All that a simulated engine makes of a prompt before its vocabulary makes a token of it: 16 bits.
_RAW = (0, 1 << 16)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that simulated engines say: `count` of them from `first` on.

    Attributes:
        is_text: They are the bytes of the text.
    """

    first: int
    count: int
    is_text: bool


#: Where the words of simulated engines begin (see `pd_serve.launch.serve`): letters, or past what is special.
_FIRST = ((ord("a"), True), (1000, False))


def simulated_vocabulary(answer: Answer) -> Vocabulary | None:
    """The vocabulary with which a simulated engine would say exactly this; None if none would.

    Source: a token is `first` + raw % `count`, so `count` divides all differences between raw and token.
    """
    if answer.prompt_token_ids is None or len(answer.token_ids) < FEWEST_TOKENS:
        return None
    for first, is_text in _FIRST:
        differences = [
            raw - (token - first)
            for raw, token in zip(
                _raw(answer.prompt_token_ids, answer.token_ids), answer.token_ids, strict=True
            )
        ]
        count = math.gcd(*differences) or _RAW[1]
        if count > max(answer.token_ids) - first and min(answer.token_ids) >= first:
            return Vocabulary(first, count, is_text)
    return None


def check_simulated(answer: Answer, vocabulary: Vocabulary, num_tokens: int) -> None:
    """Args:
        num_tokens: How many were asked for.

    Raises:
        StreamError: These are not the tokens (or not their text) that follow from the prompt.
    """
    if answer.prompt_token_ids is None:
        raise StreamError("the stream does not name its prompt", "no prompt_token_ids")
    words = (vocabulary.first, vocabulary.count)
    expected = expected_output(TokenPrompt(answer.prompt_token_ids), num_tokens, _BLOCK_TOKENS, words)
    check_same(answer.token_ids, expected)
    if vocabulary.is_text:
        check_text(answer.text, bytes(expected).decode("ascii"))


def check_same(got: Sequence[int], expected: Sequence[int]) -> None:
    """Compares tokens; says what kind of fault it is, as far as a single one explains what came.

    Raises:
        StreamError: They differ.
    """
    got, expected = list(got), list(expected)
    if got == expected:
        return
    pairs = zip(got, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(expected)))
    here, there = got[at:], expected[at:]
    if _agree(here, there[1:]):
        kind = "a token is lost"
    elif here and at and here[0] == got[at - 1] and _agree(here[1:], there):
        kind = "a token is repeated"
    elif not here:
        kind = "the last tokens are missing"
    elif not there:
        kind = "there are too many tokens"
    elif here[1:] == there[1:]:
        kind = "a token is wrong"
    elif here[:2] == there[1::-1] and here[2:] == there[2:]:
        kind = "two tokens are swapped"
    else:
        kind = "tokens are wrong from one on"
    raise StreamError(kind, f"token {at} of {len(expected)}: {here[:6]} instead of {there[:6]}")


def check_text(got: str, expected: str) -> None:
    """Raises: StreamError: The text is not that of the tokens."""
    if got != expected:
        raise StreamError("the text is not that of the tokens", f"{got[:60]!r} instead of {expected[:60]!r}")


def _agree(left: Sequence[int], right: Sequence[int]) -> bool:
    """They are the same, at least where they overlap: a stream with a fault may be cut to its length."""
    length = min(len(left), len(right))
    return left == right or (
        length > 0 and abs(len(left) - len(right)) == 1 and left[:length] == right[:length]
    )


def _raw(prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """What an engine has to make tokens of after the prompt and after each token that was said."""
    prompts = ([*prompt, *output[:said]] for said in range(len(output)))
    return [expected_output(TokenPrompt(tokens), 1, _BLOCK_TOKENS, _RAW)[0] for tokens in prompts]
