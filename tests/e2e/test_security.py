"""A running cluster, as somebody sees it who has none of its keys."""

import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from pd_serve.api.keys import OPEN_PREFIXES
from tests.e2e.conftest import run_cluster
from tests.e2e.open_ports import Port, ask_all, listening, processes
from tests.e2e.server_process import ServerProcess

API_KEY, ADMIN_KEY, SECRET = "sk-clients", "sk-admin", "a-secret-of-this-cluster-0123456789"

#: Processes of Ray's own, and what stays open there: its metrics, which are counters to read.
RAY_PROCESSES = {
    "gcs_server",
    "raylet",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "monitor.py",
    "dashboard.py",
}
RAY_METRICS = {"ray::DashboardAgent", "monitor.py", "dashboard.py"}

API_SERVER = "pd_serve.launch.api_server_process"
OUR_PROCESSES = {"pd-serve", API_SERVER, "ray::InstanceActor", "ray::SchedulerActor"}


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    """Real engines, which have moved a request already: every socket that there will be is there."""
    environment = {
        "VLLM_API_KEY": API_KEY,
        "PD_SERVE_ADMIN_KEY": ADMIN_KEY,
        "PD_SERVE_CLUSTER_SECRET": SECRET,
    }
    flags = ("--prefill", "1", "--decode", "1", "--max-body-bytes", "100000", "--max-connections", "30")
    with run_cluster(logs / "security.log", *flags, environment=environment) as server:
        complete(server)
        yield server


def ask(server: ServerProcess, path: str, key: str | None = None, method: str = "GET") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, server.url + path, headers=headers, timeout=60)


def complete(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 20


def ports_by_protocol(server: ServerProcess) -> dict[str, list[Port]]:
    found: dict[str, list[Port]] = {}
    for port, protocol in ask_all(list(listening(server)), lambda port: port.speaks):
        found.setdefault(protocol, []).append(port)
    return found


def test_no_port_answers_a_peer_without_the_secret(server: ServerProcess) -> None:
    """All listening ports of all processes. Those that speak gRPC are Ray's, also in our processes."""
    ports = ports_by_protocol(server)

    assert {port.process for ports in ports.values() for port in ports} >= OUR_PROCESSES
    assert {port.process for ports in ports.values() for port in ports} <= OUR_PROCESSES | RAY_PROCESSES
    assert [port for ports in ports.values() for port in ports if not port.is_loopback] == []
    assert set(ports) == {"http", "zeromq", "grpc", "nothing"}

    # ZeroMQ: two of the API server (messages, tokens), one of the manager and of every other process.
    assert Counter(port.process for port in ports["zeromq"]) == {
        "pd-serve": 1,
        API_SERVER: 2,
        "ray::InstanceActor": 2,
        "ray::SchedulerActor": 1,
    }
    assert [port for port in ports["zeromq"] if port.lets_in("none") or port.lets_in("others")] == []

    # NIXL (UCX) and gloo: not a byte.
    assert {port.process for port in ports["nothing"]} == {"ray::InstanceActor"}
    assert [port for port, silent in ask_all(ports["nothing"], Port.says_nothing) if not silent] == []

    # HTTP: ours, below, which the manager holds open for API servers; and Ray's.
    ours = {port for port in ports["http"] if port.process in OUR_PROCESSES}
    assert {(port.process, port.number) for port in ours} == {
        ("pd-serve", server.port),
        (API_SERVER, server.port),
    }
    for port in set(ports["http"]) - ours:
        allowed = {401, 404, 200} if port.process in RAY_METRICS else {401}
        assert {port.get(path) for path in ("/", "/api/version", "/metrics", "/logs")} <= allowed, port

    # gRPC: Ray's.
    for port in ports["grpc"]:
        codes = port.ask_ray()
        assert codes <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, port
        assert "UNAUTHENTICATED" in codes or port.process in RAY_PROCESSES, port


def wait_for(condition: Callable[[], bool], bound_s: float = 60.0) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


def refusals(server: ServerProcess) -> list[str]:
    """Names of the processes that have told of a stranger, as often as they have."""
    return re.findall(r"(\S+): refused a peer at 127\.0\.0\.1, ", server.tail(10**6))


def test_rejected_peers_are_one_log_line_per_process_and_change_nothing(server: ServerProcess) -> None:
    """They have sent a forged membership."""
    for port in ports_by_protocol(server)["zeromq"]:
        assert not port.lets_in("others")

    complete(server)

    states = [instance["state"] for instance in ask(server, "/cluster", ADMIN_KEY).json()["instances"]]
    assert states == ["ready", "ready"]
    wait_for(lambda: len(refusals(server)) >= 5)  # Ray passes the lines on
    names = sorted(name.split("-")[0] for name in refusals(server))
    assert names == ["api", "decode", "manager", "prefill", "scheduler"]


@pytest.mark.parametrize("key", [None, "wrong", ADMIN_KEY])
def test_every_path_requires_the_api_key(server: ServerProcess, key: str | None) -> None:
    """But for those that are open by design, and `/cluster`."""
    paths = ask(server, "/openapi.json").json()["paths"]
    answers = {
        (method, path): ask(server, re.sub(r"\{[^}]*\}", "x", path), key, method.upper())
        for path, methods in paths.items()
        for method in methods
        if path not in OPEN_PREFIXES and not (key == ADMIN_KEY and path.startswith("/cluster"))
    }

    assert len(answers) > 15
    assert {what for what, answer in answers.items() if answer.status_code != 401} == set()
    assert all(answer.json() == {"error": "Unauthorized"} for answer in answers.values())


def test_each_key_opens_only_its_own_paths(server: ServerProcess) -> None:
    assert ask(server, "/v1/models", API_KEY).status_code == 200
    assert ask(server, "/cluster", ADMIN_KEY).status_code == 200
    assert ask(server, "/cluster", API_KEY).status_code == 401


def test_openai_python_raises_authentication_error_for_a_wrong_key(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_limits_of_body_and_connections_hold(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    body = {"model": "tiny", "prompt": "x" * 100_000}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 413

    with ExitStack() as open_connections:
        for _ in range(29):
            open_connections.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        statuses = []
        for _ in range(5):
            client = open_connections.enter_context(httpx.Client(base_url=server.url, timeout=60))
            statuses.append(client.get("/health").status_code)
    assert statuses[-1] == 503
    wait_for(lambda: ask(server, "/health").status_code == 200)


def test_no_secret_is_shown(server: ServerProcess) -> None:
    """In no log and no command line; the cluster's secret in no other process's environment either."""
    secrets = (API_KEY, ADMIN_KEY, SECRET)
    log = server.tail(10**6)
    lines = [" ".join(process.cmdline()) for process in processes(server)]

    assert len(lines) > 8
    assert [secret for secret in secrets if secret in log or any(secret in line for line in lines)] == []
    for process in processes(server)[1:]:
        assert "PD_SERVE_CLUSTER_SECRET" not in process.environ(), process


def test_rays_token_is_new_in_each_run(server: ServerProcess) -> None:
    [raylet] = [process for process in processes(server) if process.name() == "raylet"]
    token = raylet.environ()["RAY_AUTH_TOKEN"]

    assert len(token) == 64
    kept = Path.home() / ".ray" / "auth_token"
    assert not kept.exists() or kept.read_text().strip() != token
    assert psutil.Process().environ().get("RAY_AUTH_TOKEN") != token
