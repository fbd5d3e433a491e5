"""vLLM's routes to functions of one engine, which a cluster of several refuses with 501, or does everywhere.

vLLM's own handlers would answer some of them with 500 and a traceback, and others as if they had been done.
"""

import json
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

from pd_serve.api.errors import error_response

#: Sources: the modules of routes in vllm/entrypoints: rl/online, serve/dev, serve/elastic_ep, serve/profile,
#: serve/fault_tolerance.
ABSENT = (
    "/sleep",
    "/wake_up",
    "/release_kv_cache_memory",
    "/pause",
    "/resume",
    "/collective_rpc",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_checker",
    "/scale_elastic_ep",
    "/start_profile",
    "/stop_profile",
    "/fault_tolerance/apply",
    "/fault_tolerance/status",
)


def refuse_absent(app: FastAPI) -> None:
    """Puts the refusals before vLLM's own routes. Most of these need `VLLM_SERVER_DEV_MODE=1`.

    vLLM's `/is_paused` makes a 500 of every error, also of the 503 of an instance that has no answer.
    """
    offered = [path for path in ABSENT if _is_offered(app, path)]
    app.router.routes[:0] = [Route(path, _refuse, methods=["GET", "POST"]) for path in offered]
    if _is_offered(app, "/is_paused", "GET"):
        app.router.routes.insert(0, Route("/is_paused", _is_paused))


def abort_everywhere(app: FastAPI, abort: Callable[[list[str]], Awaitable[int]]) -> None:
    """Ends requests of all API servers, where vLLM's own handler ends those of the one that answers.

    Args:
        abort: Ends requests by name, or all of them if no name is given, and returns their number.

    Source: vllm/entrypoints/rl/online/api_router.py, abort_requests
    """

    async def serve(request: Request) -> JSONResponse:
        try:
            body = json.loads(await request.body())
        except ValueError:
            return error_response(400, "The body is not JSON.")
        names = (body.get("request_ids") or []) if isinstance(body, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return error_response(400, "request_ids has to be a list of strings.")
        return JSONResponse({"status": "aborted", "aborted": await abort(names)})

    path = "/abort_requests"
    if _is_offered(app, path):
        app.router.routes.insert(0, Route(path, serve, methods=["POST"]))


def _is_offered(app: FastAPI, path: str, method: str = "POST") -> bool:
    scope = {"type": "http", "path": path, "method": method}
    return any(route.matches(scope)[0] is not Match.NONE for route in app.router.routes)


async def _refuse(request: Request) -> JSONResponse:
    return error_response(501, f"{request.url.path} is a function of one engine, and this is a cluster.")


async def _is_paused(request: Request) -> JSONResponse:
    return JSONResponse({"is_paused": await request.app.state.engine_client.is_paused()})
