"""Chunks of a stream, added to an answer."""

from typing import Any

import pytest

from loadtests.answer import StreamedAnswer, StreamError


def chunk(*token_ids: int, reason: str | None = None) -> dict[str, Any]:
    text = bytes(token_ids).decode()
    return {"choices": [{"text": text, "token_ids": list(token_ids), "finish_reason": reason}]}


def answer(*chunks: dict[str, Any]) -> StreamedAnswer:
    result = StreamedAnswer()
    for number, one in enumerate(chunks):
        result.add(one, now_s=float(number))
    return result


def test_chunks_are_joined_and_only_those_with_tokens_are_timed() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    result = answer(chunk(97, 98), chunk(), chunk(99, reason="length"), usage)

    assert (result.token_ids, result.text, result.times_s) == ([97, 98, 99], "abc", [0.0, 2.0])
    assert (result.finish_reason, result.usage) == ("length", {"completion_tokens": 3})


def test_a_chat_chunk_has_its_text_in_a_delta() -> None:
    choice = {"delta": {"content": "a"}, "token_ids": [97], "finish_reason": None}

    assert answer({"choices": [choice], "prompt_token_ids": [1, 2]}).text == "a"


def test_an_error_chunk_is_an_error() -> None:
    with pytest.raises(StreamError, match="ended with an error"):
        answer(chunk(97), {"error": {"message": "no"}})


def test_tokens_after_the_finish_reason_are_an_error() -> None:
    with pytest.raises(StreamError, match="after the finish reason"):
        answer(chunk(97, reason="length"), chunk(98))


def test_a_chunk_after_the_end_is_an_error() -> None:
    result = answer(chunk(97))
    result.done = True

    with pytest.raises(StreamError, match="went on after its end"):
        result.add(chunk(98), 1.0)
