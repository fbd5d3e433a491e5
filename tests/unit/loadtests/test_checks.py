"""The checks of a stream: each passes for a good stream and fails for its fault."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.checks import (
    Vocabulary,
    check_counts,
    check_same,
    check_simulated,
    check_text,
    check_whole,
    simulated_vocabulary,
)
from loadtests.workload import PlannedRequest
from pd_serve.simulated_engine.contents import TokenPrompt, expected_output

PROMPT = list(range(40, 90))
LETTERS = Vocabulary(ord("a"), 26, is_text=True)
TOKENS = 60
REQUEST = PlannedRequest(0, 0.0, "completions", len(PROMPT), TOKENS)


def generated(vocabulary: Vocabulary = LETTERS, num_tokens: int = TOKENS) -> list[int]:
    return expected_output(TokenPrompt(PROMPT), num_tokens, 32, (vocabulary.first, vocabulary.count))


def chunks(tokens: list[int], api: str = "completions") -> list[dict[str, Any]]:
    """Chunks like those of vLLM: the prompt in the first, the reason in the last, usage on its own."""
    parts = []
    for number, token in enumerate(tokens):
        text = chr(token) if token < 128 else "word "
        choice: dict[str, Any] = {"token_ids": [token], "finish_reason": None}
        choice |= {"text": text} if api == "completions" else {"delta": {"content": text}}
        if number == len(tokens) - 1:
            choice["finish_reason"] = "length"
        parts.append({"choices": [choice]})
    parts[0]["choices"][0]["prompt_token_ids"] = PROMPT
    usage = {"prompt_tokens": len(PROMPT), "completion_tokens": len(tokens)}
    return [*parts, {"choices": [], "usage": usage}]


def answer(parts: list[dict[str, Any]], *, done: bool = True) -> StreamedAnswer:
    result = StreamedAnswer()
    for number, chunk in enumerate(parts):
        result.add(chunk, now_s=float(number))
    result.done = done
    return result


def check(result: StreamedAnswer) -> None:
    check_whole(result)
    check_simulated(result, LETTERS, TOKENS)
    check_counts(result, REQUEST)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_good_stream_passes_all_checks(api: str) -> None:
    result = answer(chunks(generated(), api))
    check(result)
    assert result.times_s == [float(number) for number in range(TOKENS)]


def lose(parts: list[Any], at: int) -> None:
    del parts[at]


def repeat(parts: list[Any], at: int) -> None:
    parts.insert(at, copy.deepcopy(parts[at]))


def swap(parts: list[Any], at: int) -> None:
    parts[at], parts[at + 1] = parts[at + 1], parts[at]


def change(parts: list[Any], at: int) -> None:
    (choice,) = parts[at]["choices"]
    choice["token_ids"] = [choice["token_ids"][0] ^ 1]


@pytest.mark.parametrize("at", [1, 30, 57])
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lose, "a token is lost"),
        (repeat, "a token is repeated"),
        (swap, "two tokens are swapped"),
        (change, "a token is wrong"),
    ],
)
def test_a_single_fault_is_named(damage: Callable[[list[Any], int], None], kind: str, at: int) -> None:
    parts = chunks(generated())
    while parts[at]["choices"][0]["token_ids"] == parts[at + 1]["choices"][0]["token_ids"]:
        at -= 1  # swapping equal tokens would be no fault
    damage(parts, at)
    with pytest.raises(StreamError, match=kind) as failure:
        check(answer(parts))
    assert failure.value.detail.startswith("token ")


@pytest.mark.parametrize("at", [0, 20, 59])
def test_a_fault_is_found_at_any_position(at: int) -> None:
    tokens = generated()
    for faulty in (
        tokens[:at] + tokens[at + 1 :],
        tokens[: at + 1] + tokens[at:],
        [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]],
        tokens[:at],
        [*tokens, tokens[at]],
    ):
        with pytest.raises(StreamError):
            check_same(faulty, tokens)


@pytest.mark.parametrize(
    ("got", "kind"),
    [
        ([1, 2, 4, 5, 6], "a token is lost"),  # and another one at the end, up to the requested length
        ([1, 2, 2, 3, 4], "a token is repeated"),
        ([1, 2], "the last tokens are missing"),
        ([1, 2, 3, 4, 5, 9], "there are too many tokens"),
        ([1, 2, 9, 9, 9], "tokens are wrong from one on"),
        ([1, 2, 3, 4, 9], "a token is wrong"),
    ],
)
def test_a_difference_of_tokens_is_named(got: list[int], kind: str) -> None:
    with pytest.raises(StreamError, match=kind):
        check_same(got, [1, 2, 3, 4, 5])


def test_the_stream_of_another_prompt_is_wrong() -> None:
    parts = chunks(generated())
    parts[0]["choices"][0]["prompt_token_ids"] = [*PROMPT[:-1], 1]
    with pytest.raises(StreamError, match="wrong"):
        check(answer(parts))


def test_text_that_differs_from_the_tokens_is_an_error() -> None:
    parts = chunks(generated())
    parts[5]["choices"][0]["text"] = "?"
    with pytest.raises(StreamError, match="the text is not that of the tokens"):
        check(answer(parts))
    with pytest.raises(StreamError, match="the text is not that of the tokens"):
        check_text("abd", "abc")


def test_a_stream_that_was_cut_off_is_an_error() -> None:
    with pytest.raises(StreamError, match="cut off"):
        check(answer(chunks(generated())[:20], done=False))
    with pytest.raises(StreamError, match="cut off"):
        check(answer(chunks(generated()), done=False))


def usage(field: str, value: int) -> Callable[[list[Any]], None]:
    def change(parts: list[Any]) -> None:
        parts[-1]["usage"][field] = value

    return change


def no_reason(parts: list[Any]) -> None:
    parts[-2]["choices"][0]["finish_reason"] = "stop"


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (usage("completion_tokens", TOKENS - 1), "usage counts other tokens"),
        (usage("prompt_tokens", 3), "usage counts another prompt"),
        (no_reason, "wrong finish reason"),
        (lambda parts: parts.pop(3), "wrong number of tokens"),
    ],
)
def test_wrong_counts_and_reasons_are_errors(damage: Callable[[list[Any]], None], kind: str) -> None:
    parts = chunks(generated())
    damage(parts)
    with pytest.raises(StreamError, match=kind):
        check_counts(answer(parts), REQUEST)


@pytest.mark.parametrize(
    "vocabulary", [LETTERS, Vocabulary(1000, 48_152, is_text=False), Vocabulary(1000, 31_000, is_text=False)]
)
def test_the_vocabulary_of_a_simulated_engine_is_inferred(vocabulary: Vocabulary) -> None:
    result = answer(chunks(generated(vocabulary, 64)))
    assert simulated_vocabulary(result) == vocabulary
    check_simulated(result, vocabulary, 64)


def test_a_vocabulary_above_16_bits_is_inferred_as_16_bits() -> None:
    result = answer(chunks(generated(Vocabulary(1000, 150_000, is_text=False), 64)))
    found = simulated_vocabulary(result)
    assert found == Vocabulary(1000, 1 << 16, is_text=False)
    check_simulated(result, found, 64)


def test_a_real_answer_has_no_simulated_vocabulary() -> None:
    result = answer(chunks([ord(letter) for letter in "the words of a real model are not made of sums " * 2]))
    assert simulated_vocabulary(result) is None


def test_a_short_answer_has_no_simulated_vocabulary() -> None:
    assert simulated_vocabulary(answer(chunks(generated()[:10]))) is None
