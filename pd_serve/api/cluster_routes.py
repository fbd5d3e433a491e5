"""`/cluster`: look at the instances, move a request or empty an instance by hand, check the invariants."""

import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pd_serve.api.cluster_models import (
    Cluster,
    DrainRequest,
    Integrity,
    Migrated,
    MigrateRequest,
    Sizes,
    Timelines,
    answers,
)
from pd_serve.api.errors import error_response
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    RefusalCode,
    UnknownTargetError,
)
from pd_serve.observe import metrics

PREFIX = "/cluster"

OWNER_AWAY = "The owner of the instances is not there; try again in a moment."


class _Route(APIRoute):
    """Bodies that are no text have FastAPI's own error; here it gets the shape of all others."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail))

        return handle_or_refuse


class _AnyText(PathConvertor):
    """As `path`, which stops at the end of a line."""

    regex = "(?s:.*)"


register_url_convertor("text", _AnyText())

router = APIRouter(prefix=PREFIX, tags=["cluster"], route_class=_Route)


@router.get("", responses=answers(ok=Cluster))
async def cluster(request: Request) -> JSONResponse:
    """All instances, who waits for one, and how many migrations were committed and aborted, by reason."""
    return JSONResponse(_finite(request.app.state.cluster.snapshot()))


@router.get("/requests/{request_id:text}", responses=answers(404, 503, ok=Timelines))
async def request_timeline(request_id: str, request: Request) -> Response:
    """Where a request has been and when, while it runs and for some time after; several for n > 1."""
    try:
        found = await request.app.state.cluster.find_requests(request_id)
    except (EngineDeadError, TimeoutError):
        return error_response(503, OWNER_AWAY)
    if not found:
        message = f"no request {request_id!r} is running, or has ended lately"
        return error_response(404, message, param="request_id")
    return JSONResponse({"id": request_id, "requests": found})


@router.post("/migrate", responses=answers(400, 404, 409, ok=Migrated))
async def migrate(body: MigrateRequest, request: Request) -> Response:
    """Move one running request to another instance and report what that cost."""
    state = request.app.state
    ids = state.engine_client.internal_ids(body.request_id)
    if len(ids) > 1:
        message = f"{body.request_id} names {len(ids)} running requests, choose one: {', '.join(sorted(ids))}"
        return error_response(409, message, param="request_id", reason=RefusalCode.AMBIGUOUS_REQUEST)
    # An id that is not of this front end may still be one the engines know.
    request_id = ids[0] if ids else body.request_id
    try:
        moved = await state.cluster.migrate(request_id, body.destination)
    except UnknownTargetError as error:
        return error_response(404, str(error))
    except MigrationRefusedError as error:
        return error_response(409, str(error), reason=error.code)
    record = moved.record
    answer = Migrated(
        downtime_ms=moved.downtime_ms,
        stages=record.stages,
        blocks=record.blocks,
        tokens=record.tokens,
    )
    return JSONResponse(answer.model_dump())


@router.post("/drain", status_code=202, responses=answers(400, 404, 409, 503, begun=DrainRequest))
async def drain(body: DrainRequest, request: Request) -> Response:
    """Begin to empty an instance, with "stop" until it is gone; or use it again ("draining": false)."""
    drained = request.app.state.cluster.drain(body.instance, draining=body.draining, stop=body.stop)
    return await _asked(drained, body.model_dump())


@router.post("/scale", status_code=202, responses=answers(400, 409, 503, begun=Sizes))
async def scale(body: Sizes, request: Request) -> Response:
    """Begin to give pools another number of instances: {"decode": 4}."""
    sizes: dict[str, int] = dict(body.items())
    return await _asked(request.app.state.cluster.scale(sizes), sizes)


@router.post("/restart", status_code=202, responses=answers(409, 503, begun=dict[str, Any]))
async def restart(request: Request) -> Response:
    """Begin to put a new instance in the place of each; `GET /cluster` shows how far it is."""
    return await _asked(request.app.state.cluster.restart(), {})


async def _asked(work: Awaitable[None], body: dict[str, Any]) -> Response:
    """202 with `body` when what somebody wants has begun, or why it has not."""
    try:
        await work
    except UnknownTargetError as error:
        return error_response(404, str(error))
    except MigrationRefusedError as error:
        return error_response(409, str(error))
    except InvalidRequestError as error:
        return error_response(400, str(error))
    except (EngineDeadError, TimeoutError):
        return error_response(503, OWNER_AWAY)
    return JSONResponse(body, status_code=202)


@router.get("/integrity", responses=answers(ok=Integrity))
async def integrity(request: Request) -> JSONResponse:
    """Whether every invariant holds, and which do not."""
    violations = await request.app.state.cluster.check_integrity()
    metrics.INTEGRITY_CHECKS.inc()
    metrics.INTEGRITY_VIOLATIONS.inc(len(violations))
    return JSONResponse({"ok": not violations, "violations": violations})


def _finite(value: Any) -> Any:
    """The same value with infinities as null: JSON has none, and an idle instance has freeness +inf."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
