"""vLLM's routes to its engine, at an API server of a cluster: each concerns all instances, or is refused."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm.entrypoints.rl.online import api_router as rl
from vllm.entrypoints.serve.dev.cache import api_router as cache
from vllm.entrypoints.serve.dev.rpc import api_router as rpc
from vllm.entrypoints.serve.dev.server_info import api_router as server_info
from vllm.entrypoints.serve.dev.sleep import api_router as sleep
from vllm.entrypoints.serve.elastic_ep import api_router as elastic_ep
from vllm.entrypoints.serve.fault_tolerance import api_router as fault_tolerance
from vllm.entrypoints.serve.profile import api_router as profile
from vllm.v1.engine import EngineCoreOutputs

from pd_serve.api.app import create_app
from pd_serve.api.codec import VllmCodec
from pd_serve.api.core import ClusterCore
from pd_serve.api.engine_client import ClusterAsyncLLM
from pd_serve.api.engine_functions import ABSENT, abort_everywhere
from pd_serve.comm.requests import CallEngine
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.frontend import Frontend
from pd_serve.launch import engine_flags
from tests.integration.flag_servers import DEFAULTS
from tests.integration.scripted_core import ScriptedCluster

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

#: Routes that all instances answer, with a call of their engines; or this API server alone.
ASKED = {
    "/is_sleeping": ("is_sleeping", False, {"is_sleeping": True}),
    "/is_paused": ("is_scheduler_paused", False, {"is_paused": True}),
    "/weight_info": ("get_weight_version", "7", {"weight_version": "7"}),
    "/reset_prefix_cache": ("reset_prefix_cache", True, {"success": False}),
    "/reset_mm_cache": ("reset_mm_cache", None, None),
    "/reset_encoder_cache": ("reset_encoder_cache", None, None),
}
#: Routes that need flags of their own.
FLAGGED = ("/start_profile", "/stop_profile", "/fault_tolerance/apply", "/fault_tolerance/status")
OWN = ("/server_info", "/get_world_size", "/is_scaling_elastic_ep", "/abort_requests")


class Instances:
    """Two; `answers` has what each answers, or raises."""

    slots = (0, 1)

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.called: list[CallEngine] = []
        self.aborted: list[list[str]] = []

    async def abort(self, names: list[str]) -> int:
        self.aborted.append(names)
        return 3

    async def call_all(self, request: CallEngine) -> dict[str, Any]:
        self.called.append(request)
        for answer in self.answers:
            if isinstance(answer, Exception):
                raise answer
        return dict(enumerate(self.answers))  # type: ignore[arg-type]


Server = tuple[httpx.AsyncClient, Instances]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server() -> AsyncIterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        instances = Instances()
        frontend = cast(Frontend, SimpleNamespace(instances=instances))
        outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        parsed = engine_flags.parse([], DEFAULTS)
        core = ClusterCore(frontend, outputs, VllmCodec(), ("generate",))
        client = ClusterAsyncLLM(parsed.server_config(), core, log_requests=False, log_stats=False)
        app = await create_app(parsed.server, client, ScriptedCluster(), max_body_bytes=2**20)
        abort_everywhere(app, instances.abort)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            yield http, instances
        client.shutdown()


async def test_every_route_of_vllm_to_its_engine_is_known_here() -> None:
    """A new version may have others, and its answer to one that a cluster does not have is a traceback."""
    modules = (rl, cache, rpc, server_info, sleep, elastic_ep, fault_tolerance, profile)
    paths = {route.path for module in modules for route in module.router.routes}  # type: ignore[attr-defined]
    assert paths == {*ABSENT, *ASKED, *OWN}


@pytest.mark.parametrize("path", FLAGGED)
async def test_a_route_that_vllm_does_not_offer_is_unknown_as_in_vllm(server: Server, path: str) -> None:
    assert (await server[0].post(path)).status_code == 404


@pytest.mark.parametrize("path", [path for path in ABSENT if path not in FLAGGED])
async def test_a_function_of_one_engine_is_refused(server: Server, path: str) -> None:
    http, instances = server
    for body in ({}, {"method": "x"}, {"new_data_parallel_size": 1}):
        answer = await http.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (501, 501, "Not Implemented")
        assert path in error["message"]
    assert instances.called == []


@pytest.mark.parametrize("path", ASKED)
async def test_all_instances_are_asked(server: Server, path: str) -> None:
    http, instances = server
    method, one, expected = ASKED[path]
    other: Any = not one if isinstance(one, bool) else one
    instances.called, instances.answers = [], [one, other]
    answer = await _call(http)(path)
    assert answer.status_code == 200
    assert expected is None or answer.json() == expected
    assert [call.method for call in instances.called] == [method]


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(
    ("failure", "text"),
    [(EngineDeadError("decode-0: broken"), "decode-0: broken"), (TimeoutError(), "does not answer")],
    ids=["fails", "hangs"],
)
async def test_an_instance_without_an_answer_is_a_503(
    server: Server, path: str, failure: Exception, text: str
) -> None:
    http, instances = server
    instances.answers = [failure]
    answer = await _call(http)(path)
    assert answer.status_code == answer.json()["error"]["code"] == 503
    assert text in answer.json()["error"]["message"]


async def test_requests_of_all_api_servers_are_aborted(server: Server) -> None:
    http, instances = server
    for body in ({"request_ids": ["a", "b"]}, {}):
        answer = await http.post("/abort_requests", json=body)
        assert (answer.status_code, answer.json()) == (200, {"status": "aborted", "aborted": 3})
    assert instances.aborted == [["a", "b"], []]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"request_ids": "a"}', b'{"request_ids": [1]}'])
async def test_an_abort_that_cannot_be_read_aborts_nothing(server: Server, body: bytes) -> None:
    http, instances = server
    instances.aborted = []
    answer = await http.post("/abort_requests", content=body)
    assert answer.status_code == answer.json()["error"]["code"] == 400
    assert instances.aborted == []


def _call(http: httpx.AsyncClient) -> Callable[[str], Any]:
    async def call(path: str) -> httpx.Response:
        is_question = path.startswith("/is_") or path == "/weight_info"
        return await (http.get(path) if is_question else http.post(path))

    return call
