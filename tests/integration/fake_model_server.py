"""A server that streams like vLLM with a simulated engine, with faults in single streams."""

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pd_serve.simulated_engine.contents import TokenPrompt, expected_output

Chunks = list[dict[str, Any]]

#: Changes the chunks of a stream; None for a status of 503 instead.
Fault = Callable[[Chunks], None] | None


class FakeModelServer:
    """The server.

    Attributes:
        faults: By the number of the request in the load.
        busy: How often a request is still to be refused with a time to come back, by its number.
        bodies: All received request bodies.
    """

    def __init__(self) -> None:
        self.faults: dict[int, Fault] = {}
        self.busy: dict[int, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator["FakeModelServer"]:
        routes = [
            Route("/v1/models", self._models),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/v1/completions", self._stream, methods=["POST"]),
            Route("/v1/chat/completions", self._stream, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            yield self
        finally:
            server.should_exit = True
            thread.join()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake", "max_model_len": 4000}]})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        tokens = list(body["prompt"].encode()) if "prompt" in body else _chat_tokens(body["messages"])
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": bytes((await request.json())["tokens"]).decode()})

    async def _stream(self, request: Request) -> Response:
        body = await request.json()
        name, chat = request.headers.get("x-request-id", ""), "messages" in body
        number = int(name.rpartition("-")[2]) if name else -1
        self.bodies.append(body)
        prompt = _chat_tokens(body["messages"]) if chat else body["prompt"]
        chunks = _chunks(prompt, body["max_tokens"], chat)
        if self.busy.get(number, 0):
            self.busy[number] -= 1
            return JSONResponse({"error": {"message": "full"}}, 503, {"Retry-After": "0"})
        if number in self.faults:
            fault = self.faults[number]
            if fault is None:
                return JSONResponse({"error": {"message": "full"}}, 503)
            fault(chunks)
        return StreamingResponse(_events(chunks), media_type="text/event-stream")


def _chat_tokens(messages: list[dict[str, str]]) -> list[int]:
    return [256, *messages[0]["content"].encode(), 257]


def _chunks(prompt: list[int], num_tokens: int, chat: bool) -> Chunks:
    chunks: Chunks = []
    for token in expected_output(TokenPrompt(prompt), num_tokens, 16, (ord("a"), 26)):
        choice = {"index": 0, "token_ids": [token], "finish_reason": None}
        choice |= {"delta": {"content": chr(token)}} if chat else {"text": chr(token)}
        chunks.append({"choices": [choice]})
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    chunks[0]["prompt_token_ids"] = prompt
    usage = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
    return [*chunks, {"choices": [], "usage": usage}]


async def _events(chunks: Chunks) -> AsyncIterator[str]:
    for chunk in chunks:
        if chunk.get("cut"):
            raise ConnectionError("cut off on purpose")
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"
