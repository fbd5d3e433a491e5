"""The FastAPI application: vLLM's routes, the `/cluster` routes and the middlewares."""

import logging
from argparse import Namespace
from collections.abc import Callable

from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app

from pd_serve.api import cluster_routes
from pd_serve.api.body_limit import BodyLimitMiddleware
from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.early_admission import admit_early
from pd_serve.api.engine_client import ClusterAsyncLLM, ClusterRefusal
from pd_serve.api.engine_functions import refuse_absent
from pd_serve.api.failed_streams import end_failed_streams
from pd_serve.api.identity import IdentityMiddleware
from pd_serve.api.keys import KeyMiddleware
from pd_serve.api.overload import OverloadMiddleware
from pd_serve.api.resumption import ResumptionMiddleware
from pd_serve.api.stream_chunks import use_templates

#: vLLM's modules of routes that log every error with its traceback, also the refusal of a request.
TRACEBACK_LOGGERS = ("vllm.entrypoints.anthropic.api_router", "vllm.entrypoints.cohere.api_router")


async def create_app(
    args: Namespace,
    engine_client: ClusterAsyncLLM,
    cluster: ClusterView,
    *,
    max_waiting: int | None = None,
    admin_key: str | None = None,
    max_body_bytes: int,
    on_429: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Builds the application, ready to be served.

    Args:
        args: vLLM's API server namespace, from `pd_serve.launch.engine_flags.parse`.
        engine_client: Its `cluster` attribute is set here.
        cluster: Used by `/cluster`, `/health` and the overload limits.
        max_waiting: Requests that may wait for a first token before further ones get 429; None: no limit.
        admin_key: Required for `/cluster`; None: the API keys, if any, are valid there too.
        max_body_bytes: Longer bodies get 413.
        on_429: See `OverloadMiddleware`.

    Returns:
        The application. `app.state.overload` counts the requests that wait; `app.state.server` is set by
        `pd_serve.api.server.serve`.
    """
    engine_client.cluster = cluster
    tasks = await engine_client.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, engine_client.model_config)
    await init_app_state(engine_client, app.state, args, tasks)
    use_templates(app.state)
    admit_early(app.state, engine_client)
    end_failed_streams(app.state)
    for name in TRACEBACK_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_refusal)

    app.state.cluster = cluster
    app.include_router(cluster_routes.router)
    refuse_absent(app)
    # Around the router, inside vLLM's own middlewares: a refusal then needs a valid key, has X-Request-Id and
    # CORS headers, and counts in vLLM's HTTP metrics. `app.add_middleware` would be outside of these, and
    # `build_app` has built the stack already: building it again would lose the HTTP metrics.
    bounded = OverloadMiddleware(
        app.router.middleware_stack, cluster=cluster, max_waiting=max_waiting, on_429=on_429
    )
    app.state.overload = bounded
    inner = IdentityMiddleware(ResumptionMiddleware(BodyLimitMiddleware(bounded, max_body_bytes)))
    api_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    app.router.middleware_stack = KeyMiddleware(inner, api_keys=api_keys, admin_key=admin_key)
    return app


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """Whether a record is not about a refusal, which the client is told and metrics count."""
    return not (record.exc_info and isinstance(record.exc_info[1], ClusterRefusal))
