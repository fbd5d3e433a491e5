"""langchain-openai: a chat model and a text model, as a chain uses them."""

import asyncio
import itertools
import os
from typing import Any, Literal

os.environ["LANGSMITH_TRACING"] = "false"

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.e2e.other_clients.session import LONG_TOKENS, MAX_TOKENS, MODEL, SEEN, TOO_LONG, address, run

SETTINGS: Any = {
    "model": MODEL,
    "base_url": address(),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
    "temperature": 0,
    "max_tokens": MAX_TOKENS,
    "max_retries": 0,
}
CHAT = ChatOpenAI(**SETTINGS, stream_usage=True)
PROMPT = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])


class Verdict(BaseModel):
    """The answer as an object."""

    status: Literal["ok"]
    size: Literal["small", "large"]


def said(message: Any) -> Any:
    reason = message.response_metadata.get("finish_reason")
    return [message.content, reason, (message.usage_metadata or {}).get("total_tokens")]


def streamed() -> Any:
    total = None
    for part in (PROMPT | CHAT).stream({"question": "Hello!"}):
        total = part if total is None else total + part
    return said(total)


async def asynchronous() -> Any:
    answer = said(await CHAT.ainvoke("Hello!"))
    return [answer, "".join([str(part.content) async for part in CHAT.astream("Hello!")])]


def batch() -> Any:
    return [said(message) for message in CHAT.batch(["One", "Two", "Three"])]


def structured() -> Any:
    no_space = {"10": -100, "32": -100}  # left alone, this model fills JSON with it
    chat = ChatOpenAI(**SETTINGS, model_kwargs={"logit_bias": no_space})
    return chat.with_structured_output(Verdict, method="json_schema").invoke("Hello!").model_dump()


def left() -> bool:
    long = {**SETTINGS, "max_tokens": LONG_TOKENS, "extra_body": {"ignore_eos": True}}
    stream = ChatOpenAI(**long).stream("Hello!")
    parts = list(itertools.islice(stream, SEEN))
    stream.close()
    return len(parts) == SEEN


run(
    "langchain-openai",
    {
        "invoke": lambda: said((PROMPT | CHAT).invoke({"question": "Hello!"})),
        "stream": streamed,
        "ainvoke and astream": lambda: asyncio.run(asynchronous()),
        "batch": batch,
        "text model": lambda: OpenAI(**SETTINGS).invoke("Once upon a time"),
        "text model, stream": lambda: "".join(OpenAI(**SETTINGS).stream("Once upon a time")),
        "structured output": structured,
        "responses API": lambda: (
            ChatOpenAI(**SETTINGS, use_responses_api=True).invoke("Hello!").content[0]["text"]
        ),
        "error: unknown model": lambda: ChatOpenAI(**{**SETTINGS, "model": "other"}).invoke("Hello!"),
        "error: bad field": lambda: ChatOpenAI(**{**SETTINGS, "max_tokens": -1}).invoke("Hello!"),
        "error: too long": lambda: CHAT.invoke(TOO_LONG),
        "stream left in the middle": left,
    },
)
