"""LoRA adapters at two API servers of one cluster, through vLLM's routes; the manager is played."""

import asyncio
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
import pytest_asyncio

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder

from pd_serve.api.app import create_app
from pd_serve.api.codec import VllmCodec
from pd_serve.api.core import ClusterCore
from pd_serve.api.engine_client import ClusterAsyncLLM
from pd_serve.api.lora_adapters import offer_adapters
from pd_serve.comm.membership import LoraAdapter
from pd_serve.comm.requests import LoadAdapter, UnloadAdapter
from pd_serve.errors import EngineDeadError, InvalidRequestError, PdServeError, UnknownTargetError
from pd_serve.frontend.frontend import Frontend
from pd_serve.frontend.lora_adapters import OfferedAdapters
from pd_serve.frontend.manager_client import ManagerClient
from pd_serve.launch import engine_flags
from tests.integration.flag_servers import DEFAULTS
from tests.integration.scripted_core import ScriptedCluster

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

FRENCH = {"lora_name": "french", "lora_path": "/adapters/french", "is_3d_lora_weight": True}


class Manager:
    """Takes the calls of API servers, and tells all of them of each change."""

    def __init__(self) -> None:
        self.adapters: dict[str, LoraAdapter] = {}
        self.refusal: PdServeError | None = None
        self.is_alive = True
        self.servers: list[OfferedAdapters] = []
        self.reloads = 0

    async def call(self, request: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        if isinstance(request, LoadAdapter):
            self.reloads += request.reload
            self.adapters[request.adapter.name] = request.adapter
        elif isinstance(request, UnloadAdapter) and self.adapters.pop(request.name, None) is None:
            raise UnknownTargetError(request.name)
        for server in self.servers:
            server.on_membership(list(self.adapters.values()))


class Server:
    """An API server without a socket. What it sends to instances is kept, and answered with one token."""

    def __init__(self, manager: Manager) -> None:
        self.adapters = OfferedAdapters(cast(ManagerClient, manager))
        manager.servers.append(self.adapters)
        self.sent: list[EngineCoreRequest] = []
        self.outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    async def submit(self, request_id: str, frames: Any, *args: Any, **kwargs: Any) -> bool:
        request = MsgpackDecoder(EngineCoreRequest).decode([bytes(frame) for frame in frames])
        self.sent.append(request)
        output = EngineCoreOutput(request_id, [104], finish_reason=FinishReason.LENGTH)
        self.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
        return False

    async def open(self) -> None:
        parsed = engine_flags.parse(["--enable-lora"], DEFAULTS)
        frontend = SimpleNamespace(
            lora_adapters=self.adapters,
            instances=SimpleNamespace(slots=[0]),
            adoption=SimpleNamespace(submit=self.submit),
        )
        core = ClusterCore(cast(Frontend, frontend), self.outputs, VllmCodec(), ("generate",))
        self.client = ClusterAsyncLLM(parsed.server_config(), core, log_requests=False, log_stats=False)
        app = await create_app(parsed.server, self.client, ScriptedCluster(), max_body_bytes=2**20)
        offer_adapters(app.state.openai_serving_models, self.adapters)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def models(self) -> list[str]:
        return [model["id"] for model in (await self.http.get("/v1/models")).json()["data"]]

    async def complete(self, model: str) -> httpx.Response:
        return await self.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def opened() -> AsyncIterator[tuple[Manager, Server, Server]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        manager = Manager()
        servers = [Server(manager), Server(manager)]
        for server in servers:
            await server.open()
        yield manager, servers[0], servers[1]
        for server in servers:
            server.client.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(opened: tuple[Manager, Server, Server]) -> AsyncIterator[tuple[Manager, Server, Server]]:
    """Without adapters."""
    manager, first, second = opened
    yield opened
    manager.refusal, manager.reloads = None, 0
    manager.adapters.clear()
    for server in (first, second):
        server.adapters.on_membership([])
        server.sent.clear()


Cluster = tuple[Manager, Server, Server]


async def test_an_adapter_is_loaded_at_one_api_server_and_served_at_all(cluster: Cluster) -> None:
    _, first, second = cluster
    assert (await second.complete("french")).status_code == 404
    answer = await first.post("/v1/load_lora_adapter", FRENCH)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'french' added successfully.")
    for server in (first, second):
        assert await server.models() == ["tiny", "french"]
        assert (await server.complete("french")).json()["model"] == "french"
    ours, theirs = first.sent[0].lora_request, second.sent[0].lora_request
    assert ours is not None
    assert theirs is not None
    assert msgspec.structs.asdict(ours) == msgspec.structs.asdict(theirs), "the same adapter for all engines"
    assert (ours.lora_name, ours.lora_path) == ("french@/adapters/french", "/adapters/french")
    assert ours.is_3d_lora_weight
    assert not ours.load_inplace
    assert (await first.complete("tiny")).status_code == 200
    assert first.sent[-1].lora_request is None


async def test_an_adapter_is_unloaded_at_another_api_server_than_it_was_loaded(cluster: Cluster) -> None:
    _, first, second = cluster
    await first.post("/v1/load_lora_adapter", FRENCH)
    assert (await first.post("/v1/load_lora_adapter", FRENCH)).status_code == 400
    answer = await second.post("/v1/unload_lora_adapter", {"lora_name": "french"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'french' removed successfully.")
    for server in (first, second):
        assert await server.models() == ["tiny"]
        assert (await server.complete("french")).status_code == 404
        assert (await server.post("/v1/unload_lora_adapter", {"lora_name": "french"})).status_code == 404


async def test_an_adapter_is_replaced_by_another_of_its_name(cluster: Cluster) -> None:
    """Requests of both may run at a time: they have different names in the engines."""
    manager, first, second = cluster
    await first.post("/v1/load_lora_adapter", FRENCH)
    await second.complete("french")
    newer = {"lora_name": "french", "lora_path": "/adapters/french-2", "load_inplace": True}
    assert (await first.post("/v1/load_lora_adapter", newer)).status_code == 200
    assert manager.reloads == 1
    await second.complete("french")
    before, after = (request.lora_request for request in second.sent)
    assert before is not None
    assert after is not None
    assert (before.lora_path, after.lora_path) == ("/adapters/french", "/adapters/french-2")
    assert before.lora_name != after.lora_name
    assert before.lora_int_id != after.lora_int_id


async def test_an_adapter_that_no_instance_can_load_is_an_error(cluster: Cluster) -> None:
    manager, first, second = cluster
    manager.refusal = PdServeError("decode-0: no such directory")
    answer = await first.post("/v1/load_lora_adapter", FRENCH)
    assert answer.status_code == 500
    assert "no such directory" in answer.text
    assert await first.models() == await second.models() == ["tiny"]


@pytest.mark.parametrize(
    ("refusal", "status", "text"),
    [
        (
            PdServeError("d0: LoRAAdapterNotFoundError: Loading lora french@x failed"),
            404,
            "lora french failed",
        ),
        (InvalidRequestError("the adapter 'french' is loaded from /elsewhere"), 400, "is loaded from"),
        (EngineDeadError("the manager is absent"), 503, "is absent"),
    ],
)
async def test_a_refusal_has_its_own_status(
    cluster: Cluster, refusal: PdServeError, status: int, text: str
) -> None:
    """Another API server may have loaded another adapter under the name at the same time."""
    manager, first, _ = cluster
    manager.refusal = refusal
    answer = await first.post("/v1/load_lora_adapter", FRENCH)
    assert answer.status_code == answer.json()["error"]["code"] == status
    assert text in answer.json()["error"]["message"]
    assert await first.models() == ["tiny"]


async def test_the_log_says_which_adapter_of_a_flag_cannot_be_loaded(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's message has `<path>` in the place of some paths."""
    manager, first, _ = cluster
    manager.refusal = PdServeError("prefill-0: no adapter")
    with pytest.raises(PdServeError, match="no adapter"):
        await first.client.add_lora(LoRARequest("french", 1, "/home/french"))
    assert "the LoRA adapter french=/home/french cannot be loaded: prefill-0: no adapter" in caplog.text


async def test_nothing_is_unloaded_while_the_manager_is_absent(cluster: Cluster) -> None:
    manager, first, second = cluster
    await first.post("/v1/load_lora_adapter", FRENCH)
    manager.refusal = EngineDeadError("the manager is absent")
    answer = await first.post("/v1/unload_lora_adapter", {"lora_name": "french"})
    assert answer.status_code == 503
    assert await first.models() == await second.models() == ["tiny", "french"]


async def test_an_adapter_that_another_api_server_unloads_at_the_same_time_is_unloaded(
    cluster: Cluster,
) -> None:
    manager, first, _ = cluster
    await first.post("/v1/load_lora_adapter", FRENCH)
    manager.adapters.clear()  # and the membership is on its way
    answer = await first.post("/v1/unload_lora_adapter", {"lora_name": "french"})
    assert answer.status_code == 200
    assert await first.models() == ["tiny"]
