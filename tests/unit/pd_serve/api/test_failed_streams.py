"""Streams that fail end with the reason."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMValidationError

from pd_serve.api.failed_streams import CONVERTERS, end_failed_streams


def _raise_as_vllm_does() -> None:
    try:
        raise GenerationError
    except GenerationError:
        raise ValueError("Input tag 'error' found using 'type' does not match")  # noqa: B904


def _raise_of_the_client() -> None:
    raise VLLMValidationError("no such grammar")


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [(_raise_of_the_client, "400", "no such grammar"), (_raise_as_vllm_does, "500", "Internal server error")],
)
async def test_the_last_event_of_a_response_is_the_error(fail: Any, code: str, message: str) -> None:
    first = SimpleNamespace(type="response.created", sequence_number=4)

    async def stream(number: int) -> AsyncIterator[Any]:
        yield first
        fail()

    state = State()
    state.openai_serving_responses = SimpleNamespace(
        responses_stream_generator=stream, create_error_response=create_error_response
    )
    end_failed_streams(state)

    began, event = [event async for event in state.openai_serving_responses.responses_stream_generator(1)]

    assert began is first
    assert (event.type, event.sequence_number) == ("error", 5)
    assert (event.code, event.message, event.param) == (code, message, None)


@pytest.mark.parametrize(("name", "method"), CONVERTERS.items())
async def test_formats_that_are_made_of_chats_have_the_error_of_the_chat(name: str, method: str) -> None:
    """They tell the text of an exception to the client."""

    async def convert(chunks: AsyncIterator[str], end: str) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            yield str(error)
        yield end

    async def chat() -> AsyncIterator[str]:
        yield 'data: {"id": "1"}\n\n'
        yield 'data: {"error": {"message": "no such grammar", "code": 400}}\n\n'
        yield "data: [DONE]\n\n"

    state = State()
    setattr(state, name, SimpleNamespace(**{method: convert}))
    end_failed_streams(state)

    events = [event async for event in getattr(getattr(state, name), method)(chat(), "end")]

    assert events == ['data: {"id": "1"}\n\n', "no such grammar", "end"]


async def test_without_these_routes_nothing_is_done() -> None:
    end_failed_streams(State())
