"""Servers to measure, as processes with the same settings: ours and vLLM's own."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import aiohttp
import psutil

from pd_serve import models
from pd_serve.errors import PdServeError
from pd_serve.launch.engine_flags import CHANGED_DEFAULTS
from pd_serve.platform.cpu import cpu_engine_defaults, is_cpu_build
from pd_serve.platform.environment import engine_environment

MODEL = "tiny"
OURS, STOCK = "pd-serve", "vllm"

#: Several that start at a time wait for each other's imports; one that fails ends before.
START_S = 600.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What all servers are started with."""

    model: str
    flags: list[str]
    environment: dict[str, str]

    @classmethod
    def of_this_machine(cls, num_engines: int = 1, **changed: Any) -> Self:
        """The defaults of `pd-serve serve tiny --neutral N`, written out for all command lines.

        Args:
            changed: Engine settings that are to be others.
        """
        model = models.resolve(MODEL)
        values: dict[str, Any] = {"dtype": models.default_dtype(MODEL), "max_num_batched_tokens": 2048}
        values |= cpu_engine_defaults() if is_cpu_build() else {"gpu_memory_utilization": 0.4}
        return cls(
            model, as_flags(values | dict(CHANGED_DEFAULTS) | changed), engine_environment(num_engines, model)
        )

    def command(self, name: str, port: int) -> list[str]:
        """The command line of one of the two servers."""
        flags = [f"--served-model-name={MODEL}", "--host=127.0.0.1", f"--port={port}", *self.flags]
        if name == OURS:
            script = Path(sys.executable).with_name("pd-serve")
            return [str(script), "serve", self.model, "--neutral=1", *flags]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.model}", *flags]


def as_flags(values: dict[str, Any]) -> list[str]:
    """As flags: `{"block_size": 32, "enforce_eager": True}` → `--block-size=32 --enforce-eager`."""

    def flag(name: str, value: Any) -> str:
        name = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name}={value}"

    return [flag(name, value) for name, value in values.items()]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready."""

    url: str
    process: Any  # psutil's

    def cpu_s(self) -> float:
        """CPU time that all its processes have used so far."""
        total = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                total += spent.user + spent.system
        return total


@asynccontextmanager
async def running(name: str, settings: Settings) -> AsyncIterator[Server]:
    """One of the servers as a process of its own, ended on leaving. Entered when it is ready.

    Raises:
        PdServeError: It did not come up.
    """
    port = free_port()
    async with _logged(name, settings.command(name, port), port, settings.environment) as server:
        yield server


@asynccontextmanager
async def _logged(
    name: str, command: list[str], port: int, environment: Mapping[str, str]
) -> AsyncIterator[Server]:
    with tempfile.TemporaryFile() as log:
        async with started(name, command, port, log, environment) as server:
            yield server


@asynccontextmanager
async def started(
    name: str, command: list[str], port: int, log: IO[bytes], environment: Mapping[str, str]
) -> AsyncIterator[Server]:
    """Any server as a process of its own, ended on leaving. Entered when it is ready.

    Args:
        port: Where the command makes it serve.
        log: Gets what it says; open for reading too.

    Raises:
        PdServeError: It did not come up.
    """
    url = f"http://127.0.0.1:{port}"
    process = await asyncio.create_subprocess_exec(
        *command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
    )
    try:
        if not await _is_up(url, process):
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise PdServeError(f"{name} did not come up; it said: {said[-1]}")
        yield Server(url, psutil.Process(process.pid))
    finally:
        descendants = []
        if process.returncode is None:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        for left in descendants:  # such as Serve's HAProxy, which outlives Ray
            with suppress(psutil.NoSuchProcess):
                left.kill()


Command = tuple[str, list[str], int, Mapping[str, str]]  # name, command line, port, environment


@asynccontextmanager
async def several(commands: Sequence[Command]) -> AsyncIterator[list[Server]]:
    """Any servers, started at the same time, ended on leaving. Entered when all are ready.

    Raises:
        PdServeError: One did not come up; the others are ended.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as group:
                starts = [stack.enter_async_context(_logged(*command)) for command in commands]
                tasks = [group.create_task(start) for start in starts]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        yield [task.result() for task in tasks]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


async def _is_up(url: str, process: asyncio.subprocess.Process) -> bool:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while process.returncode is None and time.monotonic() < deadline:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.2)
    return False
