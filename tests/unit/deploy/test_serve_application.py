"""deploy/: what Ray Serve is given is what Ray Serve takes."""

import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import EngineDeadError, InvalidRequestError
from pd_serve.launch.api_server import ApiServer
from pd_serve.launch.ray_serve import (
    REQUEST_ID_FLAG,
    ApiServerDeployment,
    InstanceManager,
    build,
    engines_of,
    serve_config,
)
from pd_serve.models.cache import cache_root


@pytest.fixture(autouse=True)
def _environment_of_the_process_stays() -> Iterator[None]:
    """Building sets what vLLM is to find in it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


YAML = Path(__file__).parents[3] / "deploy" / "serve.yaml"


def test_the_file_is_in_serves_schema_and_its_arguments_are_ours() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text(encoding="utf-8")))
    (application,) = config.applications
    module, name = application.import_path.split(":")
    assert (module, name) == (build.__module__, build.__name__)
    settings = serve_config(application.args)
    assert settings.api_servers > 1
    assert settings.instances == {"prefill": 1, "decode": 2, "neutral": 0}
    assert config.http_options.host == "127.0.0.1"


def test_what_is_built_is_in_serves_schema() -> None:
    args = {"model": "tiny", "prefill": "1", "decode": "2", "api_servers": "3"}  # as `serve run` gives them
    application = build(args)
    assert isinstance(application, Application)
    deployment: Any = application._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("ApiServer", 3)
    schema = {
        "import_path": "pd_serve.launch.ray_serve:build",
        "args": args,
        "deployments": [{"name": deployment.name}],
    }
    ServeApplicationSchema.model_validate(schema)


def test_building_sets_what_vllm_reads_and_nothing_that_ray_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A variable of Ray that is set after Ray was imported makes this process disagree with Ray."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("t" * 32)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PD_SERVE_CACHE", str(cache_root()))
    before = dict(os.environ)

    build({"model": "tiny"})

    changed = {name for name in os.environ if os.environ[name] != before.get(name)}
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in changed | before.keys()
    assert not [name for name in changed if name.startswith(("RAY_", "UCX_"))]


def test_the_request_id_header_is_left_to_serve() -> None:
    assert serve_config({"flags": "--seed 1"}).flags == (REQUEST_ID_FLAG, "--seed", "1")


#: Their methods are called with played instances: those of Serve have an end that only Serve awaits.
MANAGER_CLASS: Any = InstanceManager.func_or_class  # type: ignore[attr-defined]
API_SERVER_CLASS: Any = ApiServerDeployment.func_or_class  # type: ignore[attr-defined]


def played_manager(engines: str) -> Any:
    """The handle of a manager of these engines."""
    manager = SimpleNamespace(_engines=engines, _manager=SimpleNamespace(address="tcp://manager"))
    return SimpleNamespace(address=SimpleNamespace(remote=partial(MANAGER_CLASS.address, manager)))


class PlayedApiServer:
    def __init__(self, manager: Any, engines: str) -> None:
        self._managers, self._engines, self._is_replaced = manager, engines, False
        client = SimpleNamespace(errored=False)
        self._api = SimpleNamespace(client=client, end_requests=self._end_requests)
        self.has_ended_requests = False

    async def _end_requests(self, why: str) -> None:
        self.has_ended_requests = True

    async def find_manager(self) -> str:
        return str(await API_SERVER_CLASS._find_manager(self))

    async def check_health(self) -> None:
        await API_SERVER_CLASS.check_health(self)


async def test_an_api_server_joins_no_manager_of_another_application() -> None:
    """Its requests would go on with another model. It ends them, and Serve ends it."""
    server = PlayedApiServer(played_manager("a"), "a")
    assert await server.find_manager() == "tcp://manager"
    await server.check_health()

    server = PlayedApiServer(played_manager("b"), "a")
    with pytest.raises(EngineDeadError, match="replaced"):
        await server.find_manager()
    with pytest.raises(RuntimeError, match="replaced"):
        await server.check_health()
    assert server.has_ended_requests


async def test_requests_of_a_replaced_application_get_503_and_streams_an_end() -> None:
    """An end without text would look like an answer."""
    ended: list[str] = []
    tokens = {"new": [], "streaming": [1]}
    requests = {
        name: SimpleNamespace(request_id=name, ledger=SimpleNamespace(token_ids=ids))
        for name, ids in tokens.items()
    }
    gate = SimpleNamespace(is_closed=False)

    async def abort_all() -> None:
        ended.append("all")

    app: Any = SimpleNamespace(state=SimpleNamespace(overload=gate))
    frontend: Any = SimpleNamespace(requests=SimpleNamespace(requests=requests))
    client: Any = SimpleNamespace(unavailable=lambda name, why: ended.append(name), abort_all=abort_all)
    await ApiServer(app, frontend, client, AsyncExitStack()).end_requests("replaced")
    assert gate.is_closed
    assert ended == ["new", "all"]


async def test_an_api_server_that_starts_before_its_manager_waits_for_it() -> None:
    server = PlayedApiServer(played_manager("a"), "b")
    with pytest.raises(EngineDeadError):
        await server.find_manager()
    server._managers = played_manager("b")
    assert await server.find_manager() == "tcp://manager"
    await server.check_health()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"prefill": 3, "policy": "round-robin", "api_servers": 4, "max_waiting_requests": 9}, True),
        ({"model": "smollm2"}, False),
        ({"flags": "--block-size 16"}, False),
        ({"engine": "simulated"}, False),
    ],
)
def test_which_applications_have_the_same_engines(change: dict[str, Any], same: bool) -> None:
    keys, other_keys = CurveKeys.of(b"k" * 32), CurveKeys.of(None)
    before, after = serve_config({"model": "tiny"}), serve_config({"model": "tiny", **change})
    assert (engines_of(before, keys) == engines_of(after, keys)) == same
    assert engines_of(before, keys) != engines_of(before, other_keys)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"prefil": 1}, "did you mean prefill"),
        ({"prefill": "many"}, "--prefill: Input should be a valid integer"),
        ({"prefill": 1, "decode": 0}, "prefill instances need decode instances"),
        ({"prefill_resources": "node_a"}, "--prefill-resources: takes JSON"),
        ({"decode_resources": '{"GPU": 1}'}, "GPU must be a custom resource"),
        ({"flags": "--max-modl-len 5"}, "did you mean --max-model-len"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(args: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        build({"model": "tiny", **args})
