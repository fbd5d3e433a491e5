"""`/dashboard`, static and open to all, and `/cluster/live`, the stream with its data."""

from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from pd_serve.api.cluster_models import responses
from pd_serve.api.errors import error_response
from pd_serve.dashboard.live_view import MAX_WATCHERS, LiveView

PAGE = Path(__file__).with_name("page")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.get("/dashboard", include_in_schema=False)
async def dashboard() -> Response:
    """Redirects to the folder of the page. All URLs are relative, for proxies with a path prefix."""
    return RedirectResponse("dashboard/", status_code=307)


@router.get(
    "/cluster/live",
    tags=["cluster"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **responses(503)},
)
async def live(request: Request) -> Response:
    """Server-sent events for the live page, about two per second; see `pd_serve.dashboard.live_view`."""
    state = request.app.state
    view: LiveView = state.live
    if view.is_full:
        return error_response(503, f"{MAX_WATCHERS} live pages are open already; close one")

    async def events() -> AsyncIterator[bytes]:
        # Ends with the server, which waits for open streams.
        async for event in view.events(lambda: state.server.should_exit):
            yield b"data: " + event + b"\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


class PageFiles(StaticFiles):
    """The files of the page, with headers that allow it to load nothing else."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def show_dashboard(app: FastAPI, view: LiveView) -> None:
    """Adds the page and its data to the application."""
    app.state.live = view
    app.include_router(router)
    app.mount("/dashboard", PageFiles(directory=PAGE, html=True), name="dashboard")
