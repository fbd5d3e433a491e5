"""Servers for the end-to-end tests: plain vLLM as the reference, and clusters of pd-serve.

A process of pytest runs one cluster at a time, and plain vLLM beside it. What several files share is ended
after the last of them, so that it takes no memory and time from the others.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from tests.connections import LIMITS
from tests.e2e.completion_client import Answer, Body, CompletionClient
from tests.e2e.otlp_receiver import OtlpReceiver
from tests.e2e.server_process import ServerProcess, pd_serve
from tests.e2e.verdicts import Verdicts
from tests.shared_servers import used_servers

T = TypeVar("T")

TIMEOUT = httpx.Timeout(120.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, ServerProcess):
                report.sections.append((f"log of {name}", value.tail()))
    return report


class SharedServers:
    """Servers by name, each started when it is first asked for."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Any, ExitStack]] = {}

    def get(self, name: str, start: Callable[[], AbstractContextManager[T]]) -> T:
        if name not in self._running:
            stack = ExitStack()
            self._running[name] = stack.enter_context(start()), stack
        value: T = self._running[name][0]
        return value

    def end_all_but(self, used: Collection[str]) -> None:
        for name in self._running.keys() - used:
            self._running.pop(name)[1].close()


_servers = pytest.StashKey[SharedServers]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    result = yield
    if _servers in item.config.stash:
        item.config.stash[_servers].end_all_but(used_servers(nextitem.path) if nextitem else ())
    return result


@pytest.fixture(scope="session")
def shared_servers(pytestconfig: pytest.Config) -> Iterator[SharedServers]:
    servers = pytestconfig.stash[_servers] = SharedServers()
    yield servers
    servers.end_all_but(())


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


class Reference:
    """Plain vLLM's answers, each asked for once and alone."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._known: dict[str, Answer] = {}

    def new_client(self) -> httpx.AsyncClient:
        """The caller closes it."""
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT)

    async def __call__(self, body: Body) -> Answer:
        key = json.dumps(body, sort_keys=True)
        if key not in self._known:
            async with self.new_client() as http:
                self._known[key] = await CompletionClient(http).answer(body)
        return self._known[key]


@pytest.fixture(scope="module")
def reference(logs: Path, shared_servers: SharedServers) -> Reference:
    return shared_servers.get("reference", lambda: run_plain_vllm(logs / "reference.log"))


@contextmanager
def run_plain_vllm(log: Path) -> Iterator[Reference]:
    """Plain vLLM with the engine settings of an instance, and prefix caching off."""
    from pd_serve import models
    from pd_serve.platform.cpu import CPU_PREFILL_CHUNK_TOKENS, cpu_engine_defaults
    from pd_serve.platform.environment import LOOPBACK, engine_environment

    model, port = models.resolve("tiny"), _free_port()
    environment = engine_environment(3, model)
    environment |= LOOPBACK | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    engine = {
        name: cpu_engine_defaults()[name] for name in ("block_size", "kv_cache_memory_bytes", "max_num_seqs")
    }
    engine |= {"dtype": "float32", "max_num_batched_tokens": CPU_PREFILL_CHUNK_TOKENS}  # equal chunks
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [
        "--model",
        model,
        "--served-model-name",
        "tiny",
        "--port",
        str(port),
        "--no-enable-prefix-caching",
    ]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()]
    server = ServerProcess(command, log, port, environment)
    try:
        server.wait_ready()
        yield Reference(server.url)
        server.signal_and_wait()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def verdicts() -> Iterator[Verdicts]:
    """Where tests say what plain vLLM and the cluster did; kept for `make compat`, forgotten otherwise."""
    verdicts = Verdicts()
    yield verdicts
    if path := os.environ.get("PD_SERVE_COMPAT_JSON"):
        verdicts.write(Path(path))


@contextmanager
def run_cluster(
    log: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A cluster of pd-serve. When it is stopped nothing may be left of it."""
    server = ServerProcess(pd_serve("serve", "tiny", "--port", "0", *flags), log, environment=environment)
    try:
        server.wait_ready()
        yield server
        left = server.signal_and_wait()
        assert not left, f"left after SIGTERM: {left}\n{server.tail()}"
        assert server.process.returncode == 0
    finally:
        server.kill()


@pytest.fixture(scope="module")
def cluster(logs: Path, shared_servers: SharedServers) -> ServerProcess:
    """One prefill and two decode instances without prefix caching, shared by many tests."""
    flags = ("--prefill", "1", "--decode", "2", "--no-enable-prefix-caching")
    return shared_servers.get("cluster", lambda: run_cluster(logs / "cluster.log", *flags))


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def simulated(logs: Path, receiver: OtlpReceiver, shared_servers: SharedServers) -> ServerProcess:
    """One prefill and two decode instances with simulated engines, of an A10 with a 7B model: a token takes
    40 ms. An instance has 780 blocks of 16 tokens."""
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "2", "--log-format", "json")
    # A larger backlog than those of most tests makes a decode instance prefill.
    roles = {"roles": True, "scale_interval_s": 1, "scale_margin": 5, "backlog_high_tokens": 15000}
    settings = [text for key, value in roles.items() for text in ("--set", f"{key}={value}")]
    tracing = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "PD_SERVE_LOG_LEVEL": "DEBUG",
    }
    return shared_servers.get(
        "simulated",
        lambda: run_cluster(logs / "simulated.log", *flags, *settings, environment=tracing),
    )


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[CompletionClient]:
    """Talks to the module's `server`; that has to be at rest and whole when the test has ended."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=LIMITS) as http:
        client = CompletionClient(http)
        client.instances = [instance["id"] for instance in (await client.cluster())["instances"]]
        yield client
        await assert_at_rest(client)


async def assert_at_rest(client: CompletionClient) -> None:
    """Nothing runs, every block is free, and the cluster finds nothing wrong with itself."""
    assert await client.integrity() == {"ok": True, "violations": []}
    for _ in range(100):  # the loads in /cluster are reports, and may be a moment old
        instances = (await client.cluster())["instances"]
        busy = [
            instance
            for instance in instances
            if instance["free_blocks"] != instance["total_blocks"]
            or any(instance[count] for count in ("running", "waiting", "migrating_in", "migrating_out"))
        ]
        if not busy:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not at rest: {busy}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
