"""vLLM's own server and ours on one scripted core each, in this process, asked the same on every route."""

import argparse
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.logger import configure_logging_from_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor
from vllm.v1.outputs import LogprobsLists

from pd_serve.api.app import create_app
from pd_serve.api.engine_client import ClusterAsyncLLM
from pd_serve.launch import engine_flags
from pd_serve.models import resolve
from pd_serve.models.byte_tokenizer import EOS_ID
from tests.integration.scripted_core import ScriptedCluster, ScriptedCore

#: The model of both servers.
DEFAULTS: dict[str, Any] = {
    "model": resolve("tiny"),
    "served_model_name": ["tiny"],
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


class TextCore(ScriptedCore):
    """Answers every request with one text, in three steps; with the logprobs that it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.token_ids = [*text.encode(), EOS_ID]

    async def _decode(self, request: EngineCoreRequest) -> None:
        parameters = request.sampling_params
        token_ids = self.token_ids[: parameters.max_tokens]
        third = -(-len(token_ids) // 3)
        for begin in range(0, len(token_ids), third):
            new = token_ids[begin : begin + third]
            reason = FinishReason.STOP if begin + third >= len(token_ids) else None
            output = EngineCoreOutput(request.request_id, new, finish_reason=reason)
            if parameters.logprobs is not None:
                width = parameters.logprobs + 1
                ids = np.array([[token, *range(65, 64 + width)] for token in new])
                output.new_logprobs = LogprobsLists(
                    ids, np.full(ids.shape, -0.5), np.ones(len(new), dtype=int)
                )
            self._outputs.put_nowait(EngineCoreOutputs(engine_index=0, outputs=[output]))
        del self.steps[request.request_id]


@dataclass(frozen=True)
class FlagServer:
    """A server without a socket.

    Attributes:
        args: What its serving layer reads its flags from.
        config: vLLM's configuration.
    """

    app: FastAPI
    args: argparse.Namespace
    config: Any

    async def ask(self, probes: Mapping[str, "Probe"]) -> dict[str, str]:
        """The answers, without what differs between two runs, by the probes' names."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return {name: await _ask(http, probe) for name, probe in probes.items()}


@dataclass(frozen=True)
class Probe:
    """A request, and the headers of the answer that count."""

    path: str
    body: dict[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    method: str = ""
    shows: tuple[str, ...] = ()


async def _ask(http: httpx.AsyncClient, probe: Probe) -> str:
    method = probe.method or ("GET" if probe.body is None else "POST")
    answer = await http.request(method, probe.path, json=probe.body, headers=probe.headers)
    shown = [f"{name}: {answer.headers[name]}" for name in probe.shows if name in answer.headers]
    return "\n".join([str(answer.status_code), *shown, _lasting(answer.text)])


def _lasting(text: str) -> str:
    """Without ids, times and durations."""
    text = re.sub(r"[0-9a-f]{16,32}", "ID", text)
    text = re.sub(r'("(?:created|created_at|completed_at)": ?)[\d.]+', r"\1T", text)
    text = re.sub(r'"metrics": ?\{[^}]*\}', '"metrics":{}', text)
    return text


async def stamp(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """A middleware, for `--middleware`."""
    response = await call_next(request)
    response.headers["x-stamp"] = "seen"
    return response


@asynccontextmanager
async def plain(flags: Sequence[str], text: str) -> AsyncIterator[FlagServer]:
    """vLLM's server, made as its own start makes it, with only the engine core replaced."""
    parser = make_arg_parser(FlexibleArgumentParser())
    base = argparse.Namespace(**engine_flags.CHANGED_DEFAULTS, **DEFAULTS)
    args = parser.parse_args(list(flags), base)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    core = TextCore(text)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(EngineCoreClient, "make_async_mp_client", lambda *a, **k: core)
        client = AsyncLLM(
            config, Executor, log_stats=not args.disable_log_stats, log_requests=args.enable_log_requests
        )
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    try:
        yield FlagServer(app, args, config)
    finally:
        client.shutdown()


@asynccontextmanager
async def ours(flags: Sequence[str], text: str) -> AsyncIterator[FlagServer]:
    """The application of `pd-serve serve`."""
    parsed = engine_flags.parse(list(flags), DEFAULTS)
    config, args = parsed.server_config(), parsed.server
    client = ClusterAsyncLLM(
        config, TextCore(text), log_requests=args.enable_log_requests, log_stats=not args.disable_log_stats
    )
    app = await create_app(args, client, ScriptedCluster(), max_body_bytes=2**20)
    try:
        yield FlagServer(app, args, config)
    finally:
        client.shutdown()


MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
PROMPT = {"model": "tiny", "prompt": "x", "max_tokens": 200}
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200}
RESPONSE = {"model": "tiny", "input": "Hi", "max_output_tokens": 200}
TOKENS = {"model": "tiny", "token_ids": [104, 105], "sampling_params": {"max_tokens": 200}}

#: Every generating route, streamed and not, plain and with what flags change.
GENERATING: dict[str, Probe] = {
    "completion": Probe("/v1/completions", PROMPT),
    "completion streamed": Probe("/v1/completions", PROMPT | {"stream": True}),
    "completion logprobs": Probe("/v1/completions", PROMPT | {"logprobs": 1}),
    "chat": Probe("/v1/chat/completions", CHAT),
    "chat streamed": Probe("/v1/chat/completions", CHAT | {"stream": True}),
    "chat logprobs": Probe("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}),
    "chat with tools": Probe("/v1/chat/completions", CHAT | {"tools": TOOLS}),
    "chat with tools streamed": Probe("/v1/chat/completions", CHAT | {"tools": TOOLS, "stream": True}),
    "chat without its tools": Probe("/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": "none"}),
    "chat in JSON": Probe("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
    "chat with a template": Probe("/v1/chat/completions", CHAT | {"chat_template": "{{ 1 }}"}),
    "chat with media settings": Probe("/v1/chat/completions", CHAT | {"mm_processor_kwargs": {"a": 1}}),
    "chat batch": Probe("/v1/chat/completions/batch", CHAT | {"messages": [MESSAGES, MESSAGES]}),
    "response": Probe("/v1/responses", RESPONSE),
    "response streamed": Probe("/v1/responses", RESPONSE | {"stream": True}),
    "message": Probe("/v1/messages", CHAT),
    "message streamed": Probe("/v1/messages", CHAT | {"stream": True}),
    "message without thinking": Probe("/v1/messages", CHAT | {"thinking": {"type": "disabled"}}),
    "message with tools": Probe(
        "/v1/messages",
        CHAT | {"tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}]},
    ),
    "tokens": Probe("/inference/v1/generate", TOKENS),
    "tokens logprobs": Probe(
        "/inference/v1/generate", TOKENS | {"sampling_params": {"max_tokens": 200, "logprobs": 1}}
    ),
    "sagemaker": Probe("/invocations", CHAT),
    "scores": Probe(
        "/generative_scoring",
        {"model": "tiny", "query": "a", "items": ["b", "c"], "label_token_ids": [65, 66]},
    ),
    "cohere": Probe("/cohere/v2/chat", CHAT),
}
OTHER: dict[str, Probe] = {
    "models": Probe("/v1/models"),
    "prompt": Probe("/tokenize", {"model": "tiny", "messages": MESSAGES, "return_token_strs": True}),
    "tokenizer": Probe("/tokenizer_info"),
    "rendered chat": Probe("/v1/chat/completions/render", CHAT),
    "rendered message": Probe("/v1/messages/render", CHAT | {"thinking": {"type": "disabled"}}),
    "docs": Probe("/docs"),
    "version": Probe("/version", headers={"X-Request-Id": "mine"}, shows=("x-request-id", "x-stamp")),
    "load": Probe("/load"),
    "preflight": Probe(
        "/v1/models",
        headers={
            "Origin": "http://page",
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Headers": "x-mine",
        },
        method="OPTIONS",
        shows=(
            "access-control-allow-origin",
            "access-control-allow-credentials",
            "access-control-allow-methods",
            "access-control-allow-headers",
        ),
    ),
}
PROBES = GENERATING | OTHER
