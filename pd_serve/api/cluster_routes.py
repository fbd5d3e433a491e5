"""`/cluster`: show the cluster, move requests, drain, scale and restart instances, check invariants."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pd_serve.api.cluster_models import (
    DrainBody,
    IntegrityResponse,
    MigrateBody,
    MigrateResponse,
    RestartBody,
    Sizes,
    TimelinesResponse,
    responses,
)
from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.errors import error_response
from pd_serve.api.keys import ADMIN_PREFIX
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    RefusalCode,
    UnknownTargetError,
)
from pd_serve.frontend.snapshot import ClusterSnapshot
from pd_serve.observe import metrics

MANAGER_ABSENT = "The manager of the instances is absent; try again in a moment."


class _Route(APIRoute):
    """Gives FastAPI's own errors, such as for a body that is not a text, OpenAI's format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail))

        return handle_or_refuse


class _AnyText(PathConvertor):
    """Like `path`, but also matches line breaks."""

    regex = "(?s:.*)"


register_url_convertor("text", _AnyText())


def _view(request: Request) -> ClusterView:
    view: ClusterView = request.app.state.cluster
    return view


router = APIRouter(prefix=ADMIN_PREFIX, tags=["cluster"], route_class=_Route)


@router.get("", responses=responses(ok=ClusterSnapshot))
async def cluster(request: Request) -> Response:
    """All instances, the requests that wait for one, and numbers of migrations by reason and outcome."""
    return Response(msgspec.json.encode(_view(request).snapshot()), media_type="application/json")


@router.get("/requests/{request_id:text}", responses=responses(404, 503, ok=TimelinesResponse))
async def request_timeline(request_id: str, request: Request) -> Response:
    """The timelines of a request, running or ended lately; several for n > 1."""
    try:
        found = await _view(request).find_requests(request_id)
    except (EngineDeadError, TimeoutError):
        return error_response(503, MANAGER_ABSENT)
    if not found:
        message = f"no request {request_id!r} is running or has ended lately"
        return error_response(404, message, param="request_id")
    return JSONResponse({"id": request_id, "requests": found})


@router.post("/migrate", responses=responses(400, 404, 409, 503, ok=MigrateResponse))
async def migrate(body: MigrateBody, request: Request) -> Response:
    """Moves a running request to another instance and reports the cost."""
    ids = request.app.state.engine_client.internal_ids(body.request_id)
    if len(ids) > 1:
        message = f"{body.request_id} names {len(ids)} running requests, choose one: {', '.join(sorted(ids))}"
        return error_response(409, message, param="request_id", reason=RefusalCode.AMBIGUOUS_REQUEST)
    # An unknown id may be that of a request of another API server.
    request_id = ids[0] if ids else body.request_id
    try:
        moved = await _view(request).migrate(request_id, body.destination)
    except UnknownTargetError as error:
        return error_response(404, str(error))
    except MigrationRefusedError as error:
        return error_response(409, str(error), reason=error.code)
    except EngineDeadError:
        return error_response(503, MANAGER_ABSENT)
    record = moved.record
    answer = MigrateResponse(
        downtime_ms=moved.downtime_ms,
        stages=record.stages,
        blocks=record.blocks,
        tokens=record.tokens,
    )
    return JSONResponse(answer.model_dump())


@router.post("/drain", status_code=202, responses=responses(400, 404, 409, 503, accepted=DrainBody))
async def drain(body: DrainBody, request: Request) -> Response:
    """Begins to drain an instance, with "stop" until it is stopped; "draining": false uses it again."""
    if body.stop and not body.draining:
        return error_response(400, 'an instance with "draining": false cannot "stop"', param="stop")
    drained = _view(request).drain(body.instance, draining=body.draining, stop=body.stop)
    return await _accepted(drained, body.model_dump())


@router.post("/scale", status_code=202, responses=responses(400, 409, 503, accepted=Sizes))
async def scale(body: Sizes, request: Request) -> Response:
    """Begins to change the number of instances of pools: {"decode": 4}."""
    sizes: dict[str, int] = dict(body.items())
    return await _accepted(_view(request).scale(sizes), sizes)


@router.post("/restart", status_code=202, responses=responses(400, 409, 503, accepted=RestartBody))
async def restart(request: Request, body: RestartBody | None = None) -> Response:
    """Begins to replace every instance, one after another; "cancel": true ends that. `GET /cluster` shows the
    progress."""
    body = body or RestartBody()
    return await _accepted(_view(request).restart(cancel=body.cancel), body.model_dump())


async def _accepted(work: Awaitable[None], body: dict[str, Any]) -> Response:
    """Answers 202 with `body` when the operation has begun, or an error."""
    try:
        await work
    except UnknownTargetError as error:
        return error_response(404, str(error))
    except MigrationRefusedError as error:
        return error_response(409, str(error))
    except InvalidRequestError as error:
        return error_response(400, str(error))
    except (EngineDeadError, TimeoutError):
        return error_response(503, MANAGER_ABSENT)
    return JSONResponse(body, status_code=202)


@router.get("/integrity", responses=responses(ok=IntegrityResponse))
async def integrity(request: Request) -> JSONResponse:
    """Checks the invariants of all processes, which should be at rest, and compares them with each other."""
    violations = await _view(request).check_integrity()
    metrics.count_integrity_check(violations)
    return JSONResponse({"ok": not violations, "violations": violations})
