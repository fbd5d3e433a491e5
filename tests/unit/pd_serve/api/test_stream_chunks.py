"""Streams made from templates have the bytes of vLLM's own streams."""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from pd_serve.api import stream_chunks
from pd_serve.api.stream_chunks import use_templates

#: What all of vLLM's serving objects have; their constructors need an engine.
SETTINGS = {
    "enable_force_include_usage": False,
    "enable_prompt_tokens_details": True,
    "enable_per_request_metrics": False,
    "enable_log_outputs": False,
    "request_logger": None,
    "parser_cls": None,
    "_include_reasoning_tokens_details": False,
    "response_role": "assistant",
    "renderer": SimpleNamespace(tokenizer=None),
}
RequestFields = dict[str, Any]


class FailingResults(Exception):
    """Raised by the engine client."""


def served(kind: type, fingerprint: str | None) -> Any:
    serving = kind.__new__(kind)
    for name, value in (SETTINGS | {"system_fingerprint": fingerprint}).items():
        setattr(serving, name, value)
    return serving


def state_of(serving: Any) -> Any:
    name = "openai_serving_chat" if isinstance(serving, OpenAIServingChat) else "openai_serving_completion"
    return SimpleNamespace(**{name: serving})


def result(text: str, token_ids: list[int], finish: str | None) -> RequestOutput:
    output = CompletionOutput(0, text, token_ids, None, None, finish_reason=finish)
    return RequestOutput(
        "r", "the prompt", [1, 2, 3], None, [output], finished=finish is not None, num_cached_tokens=2
    )


async def played(results: list[Any], closed: list[bool]) -> AsyncGenerator[Any, None]:
    """What the engine client brings; it waits at the end if that is `...`."""
    try:
        for one in results:
            if one is FailingResults:
                raise FailingResults("no")
            await (asyncio.Event().wait() if one is ... else asyncio.sleep(0))
            yield one
    finally:
        closed.append(True)


async def numbered(results: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """As vLLM does it with several prompts."""
    try:
        async for one in results:
            yield 0, one
    finally:
        await results.aclose()


def stream(
    serving: Any, results: list[Any], fields: RequestFields, closed: list[bool]
) -> AsyncGenerator[str, None]:
    metadata: Any = SimpleNamespace()
    given = played(results, closed)
    if isinstance(serving, OpenAIServingChat):
        chat = ChatCompletionRequest(model="tiny", messages=[{"role": "user", "content": "x"}], **fields)
        return serving.chat_completion_stream_generator(
            chat, given, "chatcmpl-1", 'tiny "model"', [], None, metadata
        )
    request = CompletionRequest(model="tiny", prompt="x", max_tokens=100, **fields)
    return serving.completion_stream_generator(
        request,
        [{"prompt": "x"}],
        numbered(given),
        "cmpl-1",
        1,
        'tiny "model"',
        num_prompts=1,
        tokenizer=None,
        request_metadata=metadata,
    )


async def whole(chunks: AsyncGenerator[str, None]) -> list[str]:
    return [chunk async for chunk in chunks]


def both(
    kind: type, results: list[Any], fields: RequestFields, fingerprint: str | None
) -> tuple[list[str], ...]:
    """Chunks of vLLM's stream, and of ours."""

    async def run() -> tuple[list[str], ...]:
        theirs, ours = served(kind, fingerprint), served(kind, fingerprint)
        use_templates(state_of(ours))
        return tuple([await whole(stream(one, results, fields, [])) for one in (theirs, ours)])

    return asyncio.run(run())


TEXTS = st.text(max_size=5) | st.sampled_from(
    ['"', "\\", "\n", "\u2028", "é", "🙂", "</script>", "data: x\n\n", ""]
)
STEPS = st.lists(st.tuples(TEXTS, st.lists(st.integers(0, 9), max_size=3)), max_size=8)
ENDS = st.sampled_from(["stop", "length", "abort", "error", FailingResults])


@pytest.fixture(
    scope="module", params=[OpenAIServingCompletion, OpenAIServingChat], ids=["completion", "chat"]
)
def kind(request: pytest.FixtureRequest) -> Iterator[type]:
    with pytest.MonkeyPatch.context() as patch:  # chunks have the time
        patch.setattr("vllm.entrypoints.openai.chat_completion.serving.time.time", lambda: 1.0)
        yield request.param


@pytest.mark.filterwarnings("ignore")
@given(steps=STEPS, end=ENDS, usage=st.booleans(), fingerprint=st.sampled_from([None, "fp"]), data=st.data())
def test_the_bytes_are_vllms(
    kind: type, steps: list[Any], end: Any, usage: bool, fingerprint: str | None, data: st.DataObject
) -> None:
    results: list[Any] = [result(text, ids, None) for text, ids in steps]
    if end is FailingResults:
        results.append(end)
    else:
        results.append(result(data.draw(TEXTS), data.draw(st.lists(st.integers(0, 9), max_size=2)), end))
    fields = {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    theirs, ours = both(kind, results, fields, fingerprint)
    assert ours == theirs


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks that were made from a template."""
    texts: list[str] = []
    fill = stream_chunks._Template.fill

    def noted(self: Any, text: str) -> str:
        texts.append(text)
        return fill(self, text)

    monkeypatch.setattr(stream_chunks._Template, "fill", noted)
    return texts


@pytest.mark.parametrize(
    ("fields", "is_plain"),
    [
        ({}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
        ({"return_token_ids": True}, False),
    ],
)
def test_chunks_that_differ_in_more_than_their_text_are_vllms(
    kind: type, made: list[str], fields: RequestFields, is_plain: bool
) -> None:
    results = [result(text, [1], None) for text in "abcd"] + [result("e", [1], "length")]
    theirs, ours = both(kind, results, {"stream": True} | fields, None)
    assert ours == theirs
    assert made == (["b", "c", "d"] if is_plain else [])


def test_another_template_than_expected_leaves_all_chunks_to_vllm(
    kind: type, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a release of vLLM wrote texts in another way."""
    monkeypatch.setattr(stream_chunks, "_MARK", 'a "mark"')
    results = [result(text, [1], None) for text in "abcd"] + [result("e", [1], "length")]
    theirs, ours = both(kind, results, {"stream": True}, None)
    assert (len(ours), len(made)) == (len(theirs), 1)
    assert ours[-3:] == theirs[-3:]


@pytest.mark.parametrize("chunks_before", [0, 1, 2, 3, 5])
async def test_a_client_that_leaves_closes_both(kind: type, chunks_before: int) -> None:
    serving, closed = served(kind, None), []
    use_templates(state_of(serving))
    results = [result("a", [1], None)] * 9
    ours = stream(serving, results, {"stream": True}, closed)
    for _ in range(chunks_before):
        await anext(ours)
    await ours.aclose()
    assert closed == [True] * bool(chunks_before)


async def test_a_cancelled_wait_reaches_the_engine_client(kind: type) -> None:
    serving, closed = served(kind, None), []
    use_templates(state_of(serving))
    results = [*[result("a", [1], None)] * 4, ...]
    reading = asyncio.create_task(whole(stream(serving, results, {"stream": True}, closed)))
    await asyncio.sleep(0.01)
    assert not reading.done()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed == [True]


RESULTS = [result(text, [1], None) for text in "abc"] + [result("d", [1], "stop")]


def another_vllm(mode: str, ended: list[bool]) -> Any:
    """As of another release: at its second item it waits, raises, or makes no or several chunks."""

    async def make(items: Any) -> AsyncGenerator[str, None]:
        number = 0
        try:
            async for item in items:
                number += 1
                if number == 2 and mode == "raises":
                    raise FailingResults("of vLLM's own")
                if number == 2 and mode == "waits":
                    await asyncio.Event().wait()
                for _ in range({"none": 0, "two": 2}.get(mode, 1) if number == 2 else 1):
                    yield f'{{"text":"{item.outputs[0].text}"}}'
            yield "[DONE]"
        finally:
            ended.append(True)

    return make


@pytest.mark.parametrize(
    ("mode", "second"), [("one", '{"text":"b"}'), ("none", ""), ("two", 2 * '{"text":"b"}')]
)
async def test_no_text_is_lost_or_replaced_whatever_vllm_makes_of_a_result(mode: str, second: str) -> None:
    closed: list[bool] = []
    ours = await whole(stream_chunks.chunks(another_vllm(mode, []), played(RESULTS, closed)))
    assert ours == ['{"text":"a"}', second, '{"text":"c"}', '{"text":"d"}', "[DONE]"]
    assert closed == [True]


async def test_an_error_of_vllms_generator_is_raised_and_ends_the_request() -> None:
    closed: list[bool] = []
    with pytest.raises(FailingResults, match="of vLLM's own"):
        await whole(stream_chunks.chunks(another_vllm("raises", []), played(RESULTS, closed)))
    assert closed == [True]


async def test_a_client_that_leaves_while_vllms_generator_waits_ends_both() -> None:
    closed: list[bool] = []
    ended: list[bool] = []
    reading = asyncio.create_task(
        whole(stream_chunks.chunks(another_vllm("waits", ended), played(RESULTS, closed)))
    )
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (closed, ended) == ([True], [True])
