"""Server processes to measure: equal command lines for ours and vLLM's, their start, CPU time and end."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil

from loadtests.processes import ProcessKind, kind_of
from pd_serve import models
from pd_serve.errors import PdServeError
from pd_serve.launch.engine_flags import CHANGED_DEFAULTS
from pd_serve.platform.cpu import cpu_engine_defaults, is_cpu_build
from pd_serve.platform.environment import engine_environment

MODEL = "tiny"
OURS, STOCK = "pd-serve", "vllm"
HOST = "127.0.0.1"

#: Servers that start together delay each other's imports. A server that fails ends the wait at once.
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0


def script(name: str) -> str:
    """Path of a console script of this Python environment, such as `pd-serve`."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
    return port


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The command line of a server process.

    Attributes:
        port: The port on which the command makes it serve.
        environment: Variables to add to those of this process.
        ready_path: Answers with 200 when it is ready.
    """

    name: str
    command: list[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """Model, engine flags and environment that all servers of a benchmark have in common."""

    model: str
    flags: list[str]
    environment: dict[str, str]

    @classmethod
    def of_this_machine(cls, num_engines: int = 1, **changed: Any) -> "SharedSettings":
        """The defaults of `pd-serve serve tiny --neutral N`, written out for all command lines.

        Args:
            changed: Engine settings with other values than the defaults.
        """
        model = models.resolve(MODEL)
        values: dict[str, Any] = {"dtype": models.default_dtype(MODEL), "max_num_batched_tokens": 2048}
        values |= cpu_engine_defaults() if is_cpu_build() else {"gpu_memory_utilization": 0.4}
        flags = as_flags(values | dict(CHANGED_DEFAULTS) | changed)
        return cls(model, flags, engine_environment(num_engines, model))

    def ours(self, instances: Mapping[str, int], port: int, *flags: str) -> ServerCommand:
        """`pd-serve serve` with a number of instances for each role, and one API server, as vLLM's has."""
        roles = [f"--{role}={number}" for role, number in instances.items()]
        own = [*roles, "--api-servers=1", *flags]
        command = [script("pd-serve"), "serve", self.model, *own, *self._common_flags(port)]
        return ServerCommand(OURS, command, port, self.environment)

    def stock(self, port: int, *flags: str, name: str = STOCK) -> ServerCommand:
        """vLLM's own API server with one engine."""
        return self.from_module("vllm.entrypoints.openai.api_server", port, *flags, name=name)

    def from_module(self, module: str, port: int, *flags: str, name: str) -> ServerCommand:
        """A module that takes the flags of vLLM's API server."""
        command = [sys.executable, "-m", module, f"--model={self.model}", *flags, *self._common_flags(port)]
        return ServerCommand(name, command, port, self.environment)

    def vllm_serve(self, port: int, *flags: str, name: str = STOCK) -> ServerCommand:
        """vLLM's own command line, with its engines in processes of their own."""
        command = [sys.executable, "-m", "loadtests.bench.vllm_cli", "serve", self.model]
        environment = self.environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return ServerCommand(name, [*command, *flags, *self._common_flags(port)], port, environment)

    def _common_flags(self, port: int) -> list[str]:
        return [f"--served-model-name={MODEL}", f"--host={HOST}", f"--port={port}", *self.flags]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Command line flags: `{"block_size": 32, "enforce_eager": True}` → `--block-size=32 --enforce-eager`."""

    def flag(name: str, value: Any) -> str:
        name = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name}={value}"

    return [flag(name, value) for name, value in values.items()]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU time of its process and all descendants so far."""
        return sum(map(_cpu_s, (self.process, *self.process.children(recursive=True))))

    def api_server_cpu_s(self) -> float:
        """CPU time of the API servers that it has started; of its process if there are none, as with vLLM."""
        return sum(map(_cpu_s, self._api_servers() or [self.process]))

    def front_end_cpu_s(self) -> float:
        """CPU time of the started process and of the API servers that it has started, without engines."""
        return sum(map(_cpu_s, (self.process, *self._api_servers())))

    def _api_servers(self) -> list[psutil.Process]:
        return [child for child in self.process.children() if _kind_of(child) is ProcessKind.API_SERVER]


def _kind_of(process: psutil.Process) -> ProcessKind:
    with suppress(psutil.NoSuchProcess):
        return kind_of(process.name(), process.cmdline())
    return ProcessKind.OTHER


def _cpu_s(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        spent = process.cpu_times()
        return float(spent.user + spent.system)
    return 0.0


@asynccontextmanager
async def running(server: ServerCommand, log: IO[bytes] | None = None) -> AsyncIterator[RunningServer]:
    """Runs a server from its readiness to the end of the block.

    Args:
        log: Receives the server's output; open for reading too. None for a temporary file.

    Raises:
        PdServeError: The server did not start.
    """
    environment = os.environ | server.environment
    with nullcontext(log) if log is not None else tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            *server.command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            if not await _is_ready(server.url + server.ready_path, process):
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines() or ["nothing"]
                raise PdServeError(f"{server.name} did not start; its last line of output: {lines[-1]}")
            yield RunningServer(server.url, psutil.Process(process.pid))
        finally:
            await _stop(process)


@asynccontextmanager
async def all_running(servers: Sequence[ServerCommand]) -> AsyncIterator[list[RunningServer]]:
    """Runs several servers, started together, from their readiness to the end of the block.

    Raises:
        PdServeError: One did not start; the others are ended.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as group:
                starts = [stack.enter_async_context(running(server)) for server in servers]
                tasks = [group.create_task(start) for start in starts]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        yield [task.result() for task in tasks]


async def _stop(process: asyncio.subprocess.Process) -> None:
    descendants: list[psutil.Process] = []
    if process.returncode is None:
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    for left in descendants:  # such as Serve's HAProxy, which outlives Ray
        with suppress(psutil.NoSuchProcess):
            left.kill()


async def _is_ready(url: str, process: asyncio.subprocess.Process) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while process.returncode is None and time.monotonic() < deadline:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.2)
    return False
