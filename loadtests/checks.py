"""Checks of a streamed answer: whole, well-formed, and the right tokens.

The tokens of a simulated engine are a known function of its prompt (`pd_serve.simulated_engine.contents`), so
its streams are checked on their own. For a real model with greedy sampling each request is sent again later.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.workload import PlannedRequest
from pd_serve.simulated_engine.contents import TokenPrompt, expected_output

#: Tokens from which a vocabulary can be inferred reliably.
MIN_TOKENS_FOR_VOCABULARY = 48

#: Any size gives the same output: the sum over all blocks does not depend on it.
_BLOCK_TOKENS = 16

#: The vocabulary of the raw 16-bit numbers that a simulated engine maps to tokens.
_RAW = (0, 1 << 16)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that simulated engines generate: `count` of them from `first` on.

    Attributes:
        is_text: The tokens are the bytes of the text.
    """

    first: int
    count: int
    is_text: bool


#: First tokens of simulated vocabularies (see `pd_serve.launch.serve`): letters, or above special tokens.
_FIRST = ((ord("a"), True), (1000, False))


def check_whole(answer: StreamedAnswer) -> None:
    """Raises: StreamError: The stream stopped before its end."""
    if not answer.done:
        raise StreamError("the stream was cut off", f"after {len(answer.token_ids)} tokens")


def check_counts(answer: StreamedAnswer, request: PlannedRequest) -> None:
    """Checks the number of tokens, the finish reason and the reported usage.

    Raises:
        StreamError: One of them is wrong.
    """
    got, wanted = len(answer.token_ids), request.output_tokens
    if got != wanted:
        raise StreamError("wrong number of tokens", f"{got} instead of {wanted}")
    if answer.finish_reason != "length":
        raise StreamError("wrong finish reason", f"{answer.finish_reason!r} instead of 'length'")
    usage = answer.usage or {}
    if usage.get("completion_tokens") != got:
        raise StreamError("usage counts other tokens", f"{usage.get('completion_tokens')} for {got}")
    # The prompt length of a chat depends on the server's template.
    if request.api == "completions" and usage.get("prompt_tokens") != request.prompt_tokens:
        raise StreamError(
            "usage counts another prompt", f"{usage.get('prompt_tokens')} for {request.prompt_tokens}"
        )


def simulated_vocabulary(answer: StreamedAnswer) -> Vocabulary | None:
    """The vocabulary with which a simulated engine generates exactly this answer; None if there is none.

    A token is `first` + raw % `count`, so `count` divides all differences between raw numbers and tokens.
    """
    if answer.prompt_token_ids is None or len(answer.token_ids) < MIN_TOKENS_FOR_VOCABULARY:
        return None
    raw_numbers = _raw(answer.prompt_token_ids, answer.token_ids)
    for first, is_text in _FIRST:
        differences = [
            raw - (token - first) for raw, token in zip(raw_numbers, answer.token_ids, strict=True)
        ]
        count = math.gcd(*differences) or _RAW[1]
        if count > max(answer.token_ids) - first and min(answer.token_ids) >= first:
            return Vocabulary(first, count, is_text)
    return None


def check_simulated(answer: StreamedAnswer, vocabulary: Vocabulary, num_tokens: int) -> None:
    """Checks the tokens, and their text, against those that follow from the prompt.

    Args:
        num_tokens: The requested number of tokens.

    Raises:
        StreamError: The tokens or the text differ.
    """
    if answer.prompt_token_ids is None:
        raise StreamError("the stream does not name its prompt", "no prompt_token_ids")
    words = (vocabulary.first, vocabulary.count)
    expected = expected_output(TokenPrompt(answer.prompt_token_ids), num_tokens, _BLOCK_TOKENS, words)
    check_same(answer.token_ids, expected)
    if vocabulary.is_text:
        check_text(answer.text, bytes(expected).decode("ascii"))


def check_same(got: Sequence[int], expected: Sequence[int]) -> None:
    """Compares tokens and names the single fault that explains a difference, if one does.

    Raises:
        StreamError: The tokens differ.
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
    """Raises: StreamError: The text differs from that of the tokens."""
    if got != expected:
        raise StreamError("the text is not that of the tokens", f"{got[:60]!r} instead of {expected[:60]!r}")


def _agree(left: Sequence[int], right: Sequence[int]) -> bool:
    """Equal at least where they overlap: a stream with a fault may be cut to its length."""
    length = min(len(left), len(right))
    return left == right or (
        length > 0 and abs(len(left) - len(right)) == 1 and left[:length] == right[:length]
    )


def _raw(prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """The raw numbers of the engine after the prompt and after each token of the output."""
    prompts = ([*prompt, *output[:length]] for length in range(len(output)))
    return [expected_output(TokenPrompt(tokens), 1, _BLOCK_TOKENS, _RAW)[0] for tokens in prompts]
