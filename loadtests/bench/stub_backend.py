"""A backend that only streams, so that a measurement shows the router in front of it.

    python -m loadtests.bench.stub_backend PORT

Answers `POST /v1/completions` with one chunk of one word per requested token, one each `TOKEN_S`, and the
requests that routers send to a server beforehand.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

#: Time before each token: about that of a step of the tiny model.
TOKEN_S = 0.002

MODEL = "tiny"


async def _health(request: Request) -> Response:
    return Response()


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def _completions(request: Request) -> Response:
    body = await request.json()
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return StreamingResponse(_events(body["max_tokens"], usage), media_type="text/event-stream")


async def _events(num_tokens: int, usage: dict[str, int]) -> AsyncIterator[str]:
    for number in range(num_tokens):
        await asyncio.sleep(TOKEN_S)
        yield _event(choices=[{"index": 0, "text": f" {number}", "finish_reason": None}])
    yield _event(choices=[], usage=usage)
    yield "data: [DONE]\n\n"


def _event(**fields: object) -> str:
    chunk = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL} | fields
    return f"data: {json.dumps(chunk)}\n\n"


def app() -> Starlette:
    return Starlette(
        routes=[
            Route("/health", _health),
            Route("/v1/models", _models),
            Route("/v1/completions", _completions, methods=["POST"]),
        ]
    )


if __name__ == "__main__":
    uvicorn.run(app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="error", loop="uvloop")
