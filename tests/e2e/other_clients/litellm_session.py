"""litellm, sync and async, by its providers `hosted_vllm` and `openai`."""

import asyncio
import itertools
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks one up on the network

import litellm

from tests.e2e.other_clients.session import (
    HELLO,
    LONG_TOKENS,
    MAX_TOKENS,
    MODEL,
    SEEN,
    TOO_LONG,
    address,
    run,
)

litellm.suppress_debug_info = True  # it goes to stdout

SERVER: Any = {"api_base": address(), "api_key": os.environ.get("OPENAI_API_KEY", "none"), "num_retries": 0}
VLLM: Any = {"model": f"hosted_vllm/{MODEL}", "max_tokens": MAX_TOKENS, "temperature": 0, **SERVER}
OPENAI: Any = {**VLLM, "model": f"openai/{MODEL}"}


def chat(settings: Any) -> Any:
    answer = litellm.completion(messages=HELLO, **settings)
    [choice] = answer.choices
    return [choice.message.content, choice.finish_reason, answer.usage.total_tokens]


def streamed(settings: Any) -> Any:
    chunks = list(litellm.completion(messages=HELLO, stream=True, **settings))
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    return ["".join(chunk.choices[0].delta.content or "" for chunk in chunks), reasons[-1]]


async def streamed_async() -> str:
    chunks = await litellm.acompletion(messages=HELLO, stream=True, **VLLM)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def text() -> Any:
    answer = litellm.text_completion(prompt="Once upon a time", **OPENAI)
    return [answer.choices[0].text, answer.choices[0].finish_reason]


def response() -> Any:
    answer = litellm.responses(
        model=f"openai/{MODEL}", input="Hello!", max_output_tokens=MAX_TOKENS, temperature=0, **SERVER
    )
    return [answer.output[0].content[0].text, answer.status]


def left() -> Any:
    """The process ends with the stream open."""
    long = {**VLLM, "max_tokens": LONG_TOKENS, "extra_body": {"ignore_eos": True}}
    stream = litellm.completion(messages=HELLO, stream=True, **long)
    return len([chunk.object for chunk in itertools.islice(stream, SEEN)])


run(
    "litellm",
    {
        "chat": lambda: chat(VLLM),
        "chat, provider openai": lambda: chat(OPENAI),
        "stream": lambda: streamed(VLLM),
        "stream, provider openai": lambda: streamed(OPENAI),
        "streams, asynchronous": lambda: asyncio.run(streamed_async()),
        "text": text,
        "responses": response,
        "error: unknown model": lambda: chat({**VLLM, "model": "hosted_vllm/other"}),
        "error: bad field": lambda: chat({**VLLM, "max_tokens": -1}),
        "error: too long": lambda: litellm.completion(
            messages=[{"role": "user", "content": TOO_LONG}], **VLLM
        ),
        "stream left in the middle": left,
    },
)
