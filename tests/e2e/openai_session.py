"""What a program sees that uses openai-python: every kind of call, as plain values."""

from collections.abc import Callable
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "tiny"
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 20
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]

#: Greedy, so that every server with this model gives the same answer.
SETTINGS: Any = {"model": MODEL, "max_tokens": 40, "temperature": 0}


class Verdict(BaseModel):
    status: Literal["ok"]
    size: Literal["small", "large"]


def said(choice: Any) -> list[Any]:
    return [choice.message.content, choice.finish_reason]


def completion(client: OpenAI) -> Any:
    answer = client.completions.create(prompt=LONG_PROMPT, logprobs=2, **SETTINGS)
    [choice] = answer.choices
    assert choice.logprobs is not None
    return [choice.text, choice.finish_reason, choice.logprobs.tokens, _usage(answer)]


def streamed_completion(client: OpenAI) -> Any:
    chunks = client.completions.create(
        prompt=LONG_PROMPT, stream=True, stream_options={"include_usage": True}, **SETTINGS
    )
    parts = list(chunks)
    text = "".join(choice.text for part in parts for choice in part.choices)
    return [text, [c.finish_reason for p in parts for c in p.choices if c.finish_reason], _usage(parts[-1])]


def chat(client: OpenAI) -> Any:
    answer = client.chat.completions.create(messages=HELLO, n=1, seed=3, **SETTINGS)
    return [said(answer.choices[0]), answer.object, answer.model, _usage(answer)]


def streamed_chat(client: OpenAI) -> Any:
    with client.chat.completions.stream(
        messages=HELLO, stop=["u6"], stream_options={"include_usage": True}, **SETTINGS
    ) as stream:
        kinds = sorted({event.type for event in stream})
        answer = stream.get_final_completion()
    return [said(answer.choices[0]), kinds, _usage(answer)]


def raw_response(client: OpenAI) -> Any:
    raw = client.chat.completions.with_raw_response.create(messages=HELLO, **SETTINGS)
    return [raw.status_code, raw.headers["content-type"], said(raw.parse().choices[0])]


def parsed(client: OpenAI) -> Any:
    no_space = {"10": -100, "32": -100}  # left alone, this model fills JSON with it
    answer = client.chat.completions.parse(
        messages=HELLO, response_format=Verdict, logit_bias=no_space, **SETTINGS
    )
    verdict = answer.choices[0].message.parsed
    return verdict.model_dump() if verdict else None


def response(client: OpenAI) -> Any:
    answer = client.responses.create(model=MODEL, input="Hello!", max_output_tokens=40, temperature=0)
    return [answer.output_text, answer.status, answer.object]


def streamed_response(client: OpenAI) -> Any:
    stream = client.responses.create(
        model=MODEL, input="Hello!", max_output_tokens=40, temperature=0, stream=True
    )
    events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return [text, sorted({event.type for event in events})]


def models(client: OpenAI) -> Any:
    return [model.id for model in client.models.list()]


CALLS: dict[str, Callable[[OpenAI], Any]] = {
    call.__name__: call
    for call in (
        completion,
        streamed_completion,
        chat,
        streamed_chat,
        raw_response,
        parsed,
        response,
        streamed_response,
        models,
    )
}

WRONG: dict[str, dict[str, Any]] = {
    "unknown model": {"prompt": "x", **SETTINGS, "model": "other"},
    "bad field": {"prompt": "x", **SETTINGS, "max_tokens": -1},
    "bad type": {"prompt": "x", **SETTINGS, "temperature": "hot"},
    "too long": {"prompt": "x" * 20_000, **SETTINGS},
}


def typed_error(client: OpenAI, wrong: dict[str, Any]) -> Any:
    """Which exception a wrong call raises, and what it carries."""
    try:
        client.completions.create(**wrong)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param, error.type, error.code, error.message]
    return None


async def asynchronous(client: AsyncOpenAI, number: int) -> Any:
    """A stream of its own, to be run beside others."""
    stream = await client.chat.completions.create(
        messages=[{"role": "user", "content": f"Count to {number}."}], stream=True, **SETTINGS
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def _usage(answer: Any) -> list[int]:
    return [answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens]
