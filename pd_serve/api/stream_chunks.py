"""Chunks of streams from a template, where they differ in their text only.

vLLM builds and validates two or three models for every chunk. Most streams have one choice without logprobs,
tools or token ids, and their chunks between the first and the last are equal but for the text. Of these
streams vLLM's generator makes the first chunks, the last ones, and one that becomes the template of those
between, so that the bytes are vLLM's. It makes all chunks of other streams.

Source: vllm/entrypoints/openai/completion/serving.py, vllm/entrypoints/openai/chat_completion/serving.py
(`completion_stream_generator`, `chat_completion_stream_generator`).
"""

import copy
import dataclasses
import types
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic_core import to_json
from starlette.datastructures import State

#: A text that is in no chunk by chance; it has the same characters in JSON.
_MARK = f"text-{uuid.uuid4().hex}"

#: Makes vLLM's generator of chunks from one of results.
MakeChunks = Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]]


def use_templates(state: State) -> None:
    """Has the streams of vLLM's serving objects made by this module.

    Args:
        state: Of the application, after vLLM's `init_app_state`.
    """
    if (completions := getattr(state, "openai_serving_completion", None)) is not None:
        make_completion = completions.completion_stream_generator

        def completion(request: Any, prompts: Any, results: Any, *args: Any, **named: Any) -> Any:
            def make(items: Any) -> Any:
                return make_completion(request, prompts, items, *args, **named)

            is_plain = len(prompts) == 1 and not request.echo and request.logprobs is None
            if is_plain and _differ_in_text_only(completions, request):
                return chunks(make, results, lambda numbered: numbered[1], lambda result: (0, result))
            return make(results)

        completions.completion_stream_generator = completion
    if (chat := getattr(state, "openai_serving_chat", None)) is not None:
        make_chat = chat.chat_completion_stream_generator

        def chat_completion(request: Any, results: Any, *args: Any, **named: Any) -> Any:
            def make(items: Any) -> Any:
                return make_chat(request, items, *args, **named)

            is_plain = chat.parser_cls is None and not request.logprobs and not chat.enable_log_outputs
            if is_plain and _differ_in_text_only(chat, request):
                return chunks(make, results)
            return make(results)

        chat.chat_completion_stream_generator = chat_completion


def _differ_in_text_only(serving: Any, request: Any) -> bool:
    """Whether that is so for all that completions and chats have in common."""
    options = request.stream_options
    has_usage = serving.enable_force_include_usage or (options and options.continuous_usage_stats)
    return request.n in (None, 1) and not request.return_token_ids and not has_usage


def _same(value: Any) -> Any:
    return value


async def chunks(
    make: MakeChunks,
    results: AsyncGenerator[Any, None],
    result_of: Callable[[Any], Any] = _same,
    item_of: Callable[[Any], Any] = _same,
) -> AsyncGenerator[str, None]:
    """The chunks of a stream of one choice.

    Args:
        make: Makes vLLM's generator. It gets the first results with tokens, the last one, and what `results`
            raises.
        results: Of the engine client; the last one has a finish reason.
        result_of: The `RequestOutput` in an item of `results`.
        item_of: The item that has a `RequestOutput`.
    """
    vllm = _SteppedGenerator(make)
    template: _Template | None = None
    has_tokens = False
    left_out: list[int] = []
    try:
        while not vllm.has_all:
            try:
                item = await anext(results)
            except (StopAsyncIteration, Exception) as end:
                vllm.end(end)
            else:
                result = result_of(item)
                (output,) = result.outputs
                is_between = has_tokens and output.finish_reason is None
                if is_between and (template is None or template.is_whole):
                    if template is None:
                        vllm.give(item_of(_with(result, text=_MARK)))
                        made = []
                        while (chunk := await vllm.chunk()) is not None:
                            made.append(chunk)
                        template = _Template.of(made)
                    else:
                        left_out += output.token_ids
                    yield template.fill(output.text)
                    continue
                has_tokens = has_tokens or bool(output.token_ids)
                if left_out:  # vLLM counts tokens
                    item = item_of(_with(result, token_ids=[*left_out, *output.token_ids]))
                    left_out = []
                vllm.give(item)
            while (chunk := await vllm.chunk()) is not None:
                yield chunk
    finally:
        try:
            await vllm.close()
        finally:
            await results.aclose()


def _with(result: Any, **changes: Any) -> Any:
    """A copy of a `RequestOutput` with other values in its only output."""
    result = copy.copy(result)
    result.outputs = [dataclasses.replace(result.outputs[0], **changes)]
    return result


class _Template(NamedTuple):
    """A chunk without its text.

    Attributes:
        is_whole: Whether other chunks can be made of it. If not, `before` is all that vLLM has made.
    """

    before: str
    after: str
    is_whole: bool = True

    @classmethod
    def of(cls, made: list[str]) -> "_Template":
        """Args: `made`: The chunks of a result with `_MARK` as its text: one, unless vLLM has changed."""
        before, *after = "".join(made).split(f'"{_MARK}"')
        if len(made) == len(after) == 1:
            return cls(before, after[0])
        return cls("".join(made), "", is_whole=False)

    def fill(self, text: str) -> str:
        """The chunk with this text; if it is not whole, whatever vLLM has made."""
        quoted = to_json(text).decode()
        return (
            f"{self.before}{quoted}{self.after}"
            if self.is_whole
            else self.before.replace(f'"{_MARK}"', quoted)
        )


class _SteppedGenerator:
    """vLLM's generator of chunks, which returns to us where it would wait for the next item.

    Attributes:
        has_all: It has got the last item, or has ended.
    """

    def __init__(self, make: MakeChunks) -> None:
        self.has_all = False
        self._items: deque[Any] = deque()
        self._end: BaseException = StopAsyncIteration()
        self._generator = make(self)
        self._step: Any = None

    def give(self, item: Any) -> None:
        """The next item."""
        self._items.append(item)

    def end(self, end: BaseException) -> None:
        """What is raised after the last item."""
        self._end = end
        self.has_all = True

    def __aiter__(self) -> "_SteppedGenerator":
        return self

    async def __anext__(self) -> Any:
        """Called by vLLM's generator."""
        if not self._items and not self.has_all:
            await _return_to_us()
        if self._items:
            return self._items.popleft()
        raise self._end

    @types.coroutine
    def chunk(self) -> Generator[Any, Any, str | None]:
        """Its next chunk; None if it needs another item first, or has ended."""
        if self._step is None:
            self._step = self._generator.__anext__()
        resume, value = self._step.send, None
        try:
            while (awaited := resume(value)) is not _NEEDS_ITEM:
                try:
                    resume, value = self._step.send, (yield awaited)
                except BaseException as error:
                    resume, value = self._step.throw, error
        except StopIteration as done:
            self._step = None
            made: str = done.value
            return made
        except StopAsyncIteration:
            self._step = None
            self.has_all = True
        except BaseException:
            self._step = None  # it has ended
            raise
        return None

    async def close(self) -> None:
        """Ends it where it is."""
        if self._step is not None:
            with suppress(GeneratorExit, StopIteration, StopAsyncIteration):
                self._step.throw(GeneratorExit())
        await self._generator.aclose()


_NEEDS_ITEM = object()


@types.coroutine
def _return_to_us() -> Generator[Any, None, None]:
    yield _NEEDS_ITEM
