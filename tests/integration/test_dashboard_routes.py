"""The live page's files and data over HTTP: access, and the end of streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pd_serve.dashboard.live_view import MAX_WATCHERS, LiveView
from pd_serve.dashboard.recent import RecentEvents
from pd_serve.dashboard.routes import PAGE, show_dashboard
from tests.integration.test_api_app import LocalService, eventually, running, vllm_config  # noqa: F401

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ADMIN = {"Authorization": "Bearer admin"}


class NoInstances:
    def __iter__(self) -> Iterator[Any]:
        return iter(())

    async def ask(self, instance_id: str, method: str) -> Any:
        raise AssertionError("there are no instances to ask")


def view_of(service: LocalService) -> LiveView:
    view: LiveView = service.app.state.live
    return view


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(vllm_config: Any) -> AsyncIterator[LocalService]:  # noqa: F811
    async with running(vllm_config, "--api-key", "user", admin_key="admin") as service:
        view = LiveView("api-1", service.cluster.snapshot, NoInstances(), RecentEvents())
        show_dashboard(service.app, view)
        yield service


class Links(HTMLParser):
    """Sources and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


async def test_the_page_is_open_and_loads_its_own_files_only(service: LocalService) -> None:
    page = await service.http.get("/dashboard", follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, "/dashboard/")
    links = set(Links(page.text).found)
    assert {"main.js", "style.css", "icon.svg"} == links
    for name in [path.name for path in PAGE.iterdir()]:
        answer = await service.http.get(f"/dashboard/{name}")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "://" not in answer.text.replace("http://www.w3.org/", "")
    assert (await service.http.get("/dashboard/../app.py")).status_code in (401, 404)
    assert (await service.http.get("/dashboard/none.js")).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer user"}])
async def test_its_data_needs_the_admin_key(service: LocalService, headers: dict[str, str]) -> None:
    assert (await service.http.get("/cluster/live", headers=headers)).status_code == 401
    assert view_of(service).num_watchers == 0


async def test_a_stream_counts_as_open_until_its_client_disconnects(service: LocalService) -> None:
    async with service.http.stream("GET", "/cluster/live", headers=ADMIN) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        for _ in range(2):
            line = await anext(lines)
            assert await anext(lines) == ""
            event = json.loads(line.removeprefix("data: "))
            shown = event["cluster"]["instances"][0]
            assert (shown["id"], shown["state"], shown["freeness"]) == ("d0", "draining", None)
        assert view_of(service).num_watchers == 1
    await eventually(lambda: view_of(service).num_watchers == 0)


async def test_one_page_too_many_gets_503(service: LocalService) -> None:
    view_of(service).num_watchers += MAX_WATCHERS
    try:
        answer = await service.http.get("/cluster/live", headers=ADMIN)
    finally:
        view_of(service).num_watchers -= MAX_WATCHERS
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)


async def test_the_server_ends_open_streams(vllm_config: Any) -> None:  # noqa: F811
    """An open stream does not delay the end of the server."""
    async with running(vllm_config) as service:
        show_dashboard(service.app, LiveView("api-1", dict, NoInstances(), RecentEvents()))
        url = str(service.http.base_url)
        async with httpx.AsyncClient(base_url=url) as http, http.stream("GET", "/cluster/live") as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            service.app.state.server.should_exit = True
            async with asyncio.timeout(60):
                assert [line async for line in lines if line.startswith("event")] == []
            await asyncio.wait({service.serving}, timeout=60)
        assert service.serving.done()
