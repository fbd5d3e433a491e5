"""Services that a load test starts: `pd-serve serve`, or the application of Ray Serve."""

import asyncio
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.processes import ServiceProcesses
from loadtests.ray_serve_service import deploy, head_command, new_environment, node_command, write_config
from loadtests.servers import MODEL, STOP_TIMEOUT_S, ServerCommand, free_port, running, script

#: A Ray node that has ended is started again after this pause.
NODE_PAUSE_S = 3.0


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """The cluster of a run.

    Attributes:
        instances: Number of instances by role, without the roles that have none.
        engine: "vllm" or "simulated".
        cost_model: See `--cost-model`; None for the default.
        api_servers: Number of API servers.
        under_ray_serve: Whether it is an application of Ray Serve.
        environment: Variables of all processes, in addition to those of this one.
    """

    instances: Mapping[str, int]
    engine: str = "simulated"
    cost_model: str | None = None
    api_servers: int = 1
    under_ray_serve: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class StartedService:
    """A running service.

    Attributes:
        command: How it was started, for reports.
        head: Process id of the first started process. Under Ray Serve the raylet below it belongs to the node
            with Ray's control store and Serve's proxy, which nothing replaces.
    """

    url: str
    command: str
    shape: ClusterShape
    processes: ServiceProcesses
    head: int


@asynccontextmanager
async def started_service(shape: ClusterShape, logs: Path) -> AsyncIterator[StartedService]:
    """Runs a service until the end of the block, and ends all that is left of it.

    Args:
        logs: Folder for the output of its processes; under Ray Serve with the logs of Ray.

    Raises:
        PdServeError: It did not start.
    """
    starting = _ray_serve if shape.under_ray_serve else _pd_serve
    processes = ServiceProcesses()
    try:
        async with starting(shape, logs, processes) as service:
            try:
                yield service
            finally:
                processes.resume_all()  # which also notes what has to be gone afterwards
    finally:
        processes.kill_all()


@asynccontextmanager
async def _pd_serve(
    shape: ClusterShape, logs: Path, processes: ServiceProcesses
) -> AsyncIterator[StartedService]:
    port = free_port()
    numbers = " ".join(f"--{role} {number}" for role, number in shape.instances.items())
    text = f"pd-serve serve {MODEL} {numbers} --engine {shape.engine} --api-servers {shape.api_servers}"
    text += f" --cost-model {shape.cost_model}" if shape.cost_model else ""
    words = [script("pd-serve"), *shlex.split(text)[1:], f"--port={port}"]
    with (logs / "server.log").open("w+b") as log:
        async with running(ServerCommand("pd-serve", words, port, shape.environment), log) as server:
            processes.add_root(server.process.pid)
            yield StartedService(server.url, text, shape, processes, server.process.pid)


@asynccontextmanager
async def _ray_serve(
    shape: ClusterShape, logs: Path, processes: ServiceProcesses
) -> AsyncIterator[StartedService]:
    """A head with API servers, manager and proxy, and one node for each role, which is started again."""
    port, control_store, dashboard = free_port(), free_port(), free_port()
    arguments: dict[str, Any] = {"model": MODEL, "engine": shape.engine, "api_servers": shape.api_servers}
    arguments |= dict(shape.instances) | {
        f"{role}_resources": json.dumps({f"node_{role}": 1}) for role in shape.instances
    }
    arguments |= {"cost_model": shape.cost_model} if shape.cost_model else {}
    environment = new_environment() | dict(shape.environment)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")))
        stack.callback(_keep_logs, folder, logs / "ray")
        log = stack.enter_context((logs / "server.log").open("w+b"))
        config = write_config(folder, port, arguments, "deploy.app:build")
        jobs = [asyncio.create_task(deploy(config, dashboard, environment))]
        for role in shape.instances:
            command = node_command(control_store, {f"node_{role}": 100})
            jobs.append(asyncio.create_task(_keep_node(command, environment, log.fileno(), processes)))

        async def cancel() -> None:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

        stack.push_async_callback(cancel)
        command = head_command(folder, control_store, dashboard)
        head = ServerCommand("Ray's head", command, port, environment)
        server = await stack.enter_async_context(running(head, log))
        processes.add_root(server.process.pid)
        shown = f"serve deploy (deploy.app:build, {json.dumps(arguments)})"
        yield StartedService(server.url, shown, shape, processes, server.process.pid)


async def _keep_node(
    command: list[str], environment: Mapping[str, str], log: int, processes: ServiceProcesses
) -> None:
    """Starts a Ray node, and again whenever it has ended, as the machine's own service manager does."""
    while True:
        node = await asyncio.create_subprocess_exec(
            *command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
        processes.add_root(node.pid)
        try:
            await node.wait()
        except asyncio.CancelledError:
            if node.returncode is None:
                node.terminate()
                with suppress(TimeoutError):  # what is left is killed with the others
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await node.wait()
            raise
        await asyncio.sleep(NODE_PAUSE_S)


def _keep_logs(ray_folder: Path, target: Path) -> None:
    """Copies the logs of Ray and of all its processes."""
    with suppress(OSError, shutil.Error):  # of processes that end meanwhile
        shutil.copytree(ray_folder / "session_latest" / "logs", target, dirs_exist_ok=True)
