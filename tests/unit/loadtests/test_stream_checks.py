"""The checks of a stream, each seen to pass on a good one and to fail on what it is there for."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from loadtests.arrival_plan import PlannedRequest
from loadtests.streamed_answer import Answer, StreamError, check_counts, check_whole
from loadtests.token_check import (
    Vocabulary,
    check_same,
    check_simulated,
    check_text,
    simulated_vocabulary,
)
from pd_serve.simulated_engine.contents import TokenPrompt, expected_output

PROMPT = list(range(40, 90))
LETTERS = Vocabulary(ord("a"), 26, is_text=True)
TOKENS = 60
REQUEST = PlannedRequest(0, 0.0, "completions", len(PROMPT), TOKENS)


def said(vocabulary: Vocabulary = LETTERS, num_tokens: int = TOKENS) -> list[int]:
    return expected_output(TokenPrompt(PROMPT), num_tokens, 32, (vocabulary.first, vocabulary.count))


def chunks(tokens: list[int], api: str = "completions") -> list[dict[str, Any]]:
    """As vLLM streams them: the prompt with the first, the reason with the last, usage by itself."""
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


def answer(parts: list[dict[str, Any]], *, done: bool = True) -> Answer:
    result = Answer()
    for number, chunk in enumerate(parts):
        result.add(chunk, now_s=float(number))
    result.done = done
    return result


def check(result: Answer) -> None:
    check_whole(result)
    check_simulated(result, LETTERS, TOKENS)
    check_counts(result, REQUEST)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_good_stream(api: str) -> None:
    result = answer(chunks(said(), api))
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
def test_one_fault(damage: Callable[[list[Any], int], None], kind: str, at: int) -> None:
    parts = chunks(said())
    while parts[at]["choices"][0]["token_ids"] == parts[at + 1]["choices"][0]["token_ids"]:
        at -= 1  # swapping equal ones would be no fault
    damage(parts, at)
    with pytest.raises(StreamError, match=kind) as failure:
        check(answer(parts))
    assert failure.value.detail.startswith("token ")


@pytest.mark.parametrize("at", [0, 20, 59])
def test_a_fault_is_found_wherever_it_is(at: int) -> None:
    tokens = said()
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
        ([1, 2, 4, 5, 6], "a token is lost"),  # and one more at the end, to the length asked for
        ([1, 2, 2, 3, 4], "a token is repeated"),
        ([1, 2], "the last tokens are missing"),
        ([1, 2, 3, 4, 5, 9], "there are too many tokens"),
        ([1, 2, 9, 9, 9], "tokens are wrong from one on"),
        ([1, 2, 3, 4, 9], "a token is wrong"),
    ],
)
def test_kinds(got: list[int], kind: str) -> None:
    with pytest.raises(StreamError, match=kind):
        check_same(got, [1, 2, 3, 4, 5])


def test_the_stream_of_another_prompt() -> None:
    parts = chunks(said())
    parts[0]["choices"][0]["prompt_token_ids"] = [*PROMPT[:-1], 1]
    with pytest.raises(StreamError, match="wrong"):
        check(answer(parts))


def test_text_of_other_tokens() -> None:
    parts = chunks(said())
    parts[5]["choices"][0]["text"] = "?"
    with pytest.raises(StreamError, match="the text is not that of the tokens"):
        check(answer(parts))
    with pytest.raises(StreamError, match="the text is not that of the tokens"):
        check_text("abd", "abc")


def test_a_stream_that_is_cut_off() -> None:
    with pytest.raises(StreamError, match="cut off"):
        check(answer(chunks(said())[:20], done=False))
    with pytest.raises(StreamError, match="cut off"):
        check(answer(chunks(said()), done=False))


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
def test_counts(damage: Callable[[list[Any]], None], kind: str) -> None:
    parts = chunks(said())
    damage(parts)
    with pytest.raises(StreamError, match=kind):
        check_counts(answer(parts), REQUEST)


def test_errors_in_the_stream() -> None:
    with pytest.raises(StreamError, match="ended with an error"):
        answer([*chunks(said())[:3], {"error": {"message": "no"}}])
    with pytest.raises(StreamError, match="after the finish reason"):
        answer([*chunks(said()), chunks(said())[1]])
    result = answer(chunks(said()))
    with pytest.raises(StreamError, match="went on after its end"):
        result.add(chunks(said())[0], 0.0)


@pytest.mark.parametrize(
    "vocabulary", [LETTERS, Vocabulary(1000, 48_152, is_text=False), Vocabulary(1000, 31_000, is_text=False)]
)
def test_a_simulated_engine_is_known_by_its_words(vocabulary: Vocabulary) -> None:
    result = answer(chunks(said(vocabulary, 64)))
    assert simulated_vocabulary(result) == vocabulary
    check_simulated(result, vocabulary, 64)


def test_a_vocabulary_larger_than_what_engines_make() -> None:
    result = answer(chunks(said(Vocabulary(1000, 150_000, is_text=False), 64)))
    found = simulated_vocabulary(result)
    assert found == Vocabulary(1000, 1 << 16, is_text=False)
    check_simulated(result, found, 64)


def test_a_model_is_no_simulated_engine() -> None:
    result = answer(chunks([ord(letter) for letter in "the words of a real model are not made of sums " * 2]))
    assert simulated_vocabulary(result) is None


def test_few_words_tell_nothing() -> None:
    assert simulated_vocabulary(answer(chunks(said()[:10]))) is None
