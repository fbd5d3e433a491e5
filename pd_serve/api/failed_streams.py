"""Ends streams that fail with an event that has the reason, on the routes where vLLM does not.

On `/v1/responses` vLLM makes an event of one kind of error, `GenerationError`, and in a format that its own
type of the events does not have: every error breaks the connection off. On `/v1/messages` and
`/cohere/v2/chat` it reads the error of a chat as a chunk of one, and tells the client what that lacks.

Source: vllm/entrypoints/openai/responses/serving.py (`responses_stream_generator`),
vllm/entrypoints/anthropic/serving.py, vllm/entrypoints/cohere/serving.py
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from openai.types.responses import ResponseErrorEvent
from starlette.datastructures import State
from vllm.exceptions import GenerationError

#: How the error of a chat begins; see `create_streaming_error_response` of vLLM.
ERROR = 'data: {"error": '

#: Methods that make streams of those of a chat, by the attribute of the application's state.
CONVERTERS = {
    "anthropic_serving_messages": "message_stream_converter",
    "cohere_serving_chat_v2": "_chat_completion_stream_to_v2",
}


def end_failed_streams(state: State) -> None:
    """Has streams end with the error that they fail with.

    Args:
        state: Of the application, after vLLM's `init_app_state`.
    """
    if (responses := getattr(state, "openai_serving_responses", None)) is not None:
        _end_responses(responses)
    for name, method in CONVERTERS.items():
        if (serving := getattr(state, name, None)) is not None:
            _raise_errors_of_chats(serving, method)


def _end_responses(serving: Any) -> None:
    generate = serving.responses_stream_generator

    async def generate_to_the_end(*arguments: Any, **named: Any) -> AsyncIterator[Any]:
        number = -1
        try:
            async for event in generate(*arguments, **named):
                number = event.sequence_number
                yield event
        except Exception as error:
            failure = error.__context__ if isinstance(error.__context__, GenerationError) else error
            why = serving.create_error_response(failure).error
            yield ResponseErrorEvent(
                type="error",
                code=str(why.code),
                message=why.message,
                param=why.param,
                sequence_number=number + 1,
            )

    serving.responses_stream_generator = generate_to_the_end


def _raise_errors_of_chats(serving: Any, method: str) -> None:
    convert = getattr(serving, method)

    def convert_with_reason(chunks: AsyncIterator[str], *arguments: Any, **named: Any) -> Any:
        return convert(_raising(chunks), *arguments, **named)

    setattr(serving, method, convert_with_reason)


async def _raising(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    async for chunk in chunks:
        if chunk.startswith(ERROR):
            # vLLM's converters end their streams with the text of an exception.
            raise RuntimeError(json.loads(chunk.removeprefix("data: "))["error"]["message"])
        yield chunk
