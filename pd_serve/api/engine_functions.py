"""vLLM's routes to functions of one engine, which a cluster of several refuses with 501.

vLLM's own handlers would answer some of them with 500 and a traceback, and others as if they had been done.
"""

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
    """Puts the refusals before vLLM's own routes. Most of these need `VLLM_SERVER_DEV_MODE=1`."""
    offered = [path for path in ABSENT if _is_offered(app, path)]
    app.router.routes[:0] = [Route(path, _refuse, methods=["GET", "POST"]) for path in offered]


def _is_offered(app: FastAPI, path: str) -> bool:
    scope = {"type": "http", "path": path, "method": "POST"}
    return any(route.matches(scope)[0] is not Match.NONE for route in app.router.routes)


async def _refuse(request: Request) -> JSONResponse:
    return error_response(501, f"{request.url.path} is a function of one engine, and this is a cluster.")
