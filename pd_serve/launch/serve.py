"""`pd-serve serve`: starts all processes, serves, and stops them; the API server runs in this process."""

import asyncio
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING
from uuid import uuid4

from migration.tasks import BackgroundTasks
from pd_serve.api.server import bind, serve
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.config import ServeConfig
from pd_serve.errors import PdServeError
from pd_serve.instance.engine_factory import CPU_ENGINE_MODULES, ENGINE_MODULES, no_moves
from pd_serve.launch.api_server import ApiServer, import_api_modules
from pd_serve.launch.console import Console
from pd_serve.launch.flag_table import vllm_version
from pd_serve.launch.preparation import Prepared, find_model, parse, placements
from pd_serve.launch.ray_address import find_ray_cluster
from pd_serve.launch.signals import end_on
from pd_serve.manager.manager import Manager
from pd_serve.platform.cpu import is_cpu_build
from pd_serve.platform.environment import ray_environment
from pd_serve.platform.fork_server import ForkServer
from pd_serve.platform.memory import check_memory
from router.load import ROLES

#: Time for Ray to start or to be joined, in seconds: a few, unless the machine is very busy.
JOIN_S = 120.0

#: They end the service.
SIGNALS = (signal.SIGINT, signal.SIGTERM)

if TYPE_CHECKING:
    from pd_serve.manager.ray_launcher import RayLauncher


async def run(config: ServeConfig, console: Console) -> None:
    """Serves until SIGINT or SIGTERM. Raises: PdServeError: with one line that says what to change."""
    end_on(*SIGNALS)
    vllm_version()  # a clear error at once, if vLLM is not installed
    sock = bind(config.host, config.port)
    # Everything ends with the only API server: no request outlives it.
    config = config.model_copy(update={"port": sock.getsockname()[1], "orphan_s": 0.0})
    service = LocalService(config, console)
    try:
        await service.start()
        await service.serve(sock)
    except asyncio.CancelledError:
        console.step("stopping")
    finally:
        sock.close()
        await service.stop()
        console.step("stopped")


class LocalService:
    """All that one `pd-serve serve` starts, and ends again."""

    def __init__(self, config: ServeConfig, console: Console) -> None:
        self._config = config
        self._console = console
        # All of them are awaited by `start`, which raises their errors: no error is logged besides.
        self._tasks = BackgroundTasks(on_failure=lambda error: None)
        self._launcher: RayLauncher | None = None
        self._manager: Manager | None = None
        self._api: ApiServer | None = None
        self._prepared: Prepared | None = None
        self._fork_server: ForkServer | None = None

    @property
    def api(self) -> ApiServer:
        """The API server, once `start` has returned."""
        assert self._api is not None
        return self._api

    async def start(self) -> None:
        config, console = self._config, self._console
        gc.disable()  # as in the instances: collecting while importing costs a tenth of the time
        ray_address = await asyncio.to_thread(find_ray_cluster, config.ray_address)
        console.step(f"preparing the model {config.model}")
        model = await asyncio.to_thread(find_model, config)
        simulated = config.engine == "simulated"
        check_memory(config.num_instances, {}, model.path, simulated=simulated)  # before anything starts
        os.environ.update(ray_environment(config.ray_address))

        local, forks = config.ray_address is None, None
        if local and not simulated and is_cpu_build():  # a process that may have touched a GPU must not fork
            forks = self._fork_server = ForkServer((*ENGINE_MODULES, *CPU_ENGINE_MODULES))

        from pd_serve.manager.ray_launcher import RayLauncher

        python = forks.python if forks is not None else None
        launcher = self._launcher = RayLauncher(ray_address, model.environment, python=python)
        console.step("starting Ray and loading vLLM")
        parsing = self._tasks.start(asyncio.to_thread(parse, config, model))
        try:
            async with asyncio.timeout(JOIN_S):
                await asyncio.to_thread(launcher.connect)
        except TimeoutError:
            where = config.ray_address or "this machine"
            raise PdServeError(f"Ray at {where} does not answer within {JOIN_S:g} s") from None
        end_on(*SIGNALS)  # Ray has replaced the handlers
        if forks is not None:
            await asyncio.to_thread(forks.wait)
        if is_cpu_build():  # importing takes longest: it goes on while the flags are parsed
            anywhere = placements(config, dict.fromkeys(ROLES, 1))
            for name, role in config.instance_roles:
                launcher.launch(name, anywhere[role])
        prepared = self._prepared = await parsing
        if local:
            engine_args = prepared.flags.engine("decode")
            check_memory(config.num_instances, engine_args, model.path, simulated=simulated)
        host = "127.0.0.1" if local else launcher.node_address()
        keys = CurveKeys.of(config.cluster_secret)
        console.step(f"starting {config.num_instances} instances")
        wire = Wire(MANAGER, host, keys)
        manager = self._manager = Manager(prepared.manager_config(host, keys), wire, launcher, console)
        starting = self._tasks.start(manager.start())

        async def find_manager() -> str:
            return manager.address

        await asyncio.to_thread(import_api_modules)
        await starting
        console.step("opening the API")
        wire = Wire(f"api-{uuid4().hex[:8]}", host, keys)
        self._api = await ApiServer.start(prepared, wire, find_manager)

    async def serve(self, sock: socket.socket) -> None:
        assert self._prepared is not None
        await serve(
            self.api.app,
            sock,
            self._prepared.flags.server,
            on_ready=self._ready,
            max_connections=self._config.max_connections,
        )

    async def stop(self) -> None:
        """Ends all processes, in about a second; a process that does not end by itself is killed."""
        if self._manager is not None:
            await self._manager.close()
        await self._tasks.cancel()
        if self._api is not None:
            await self._api.close()
        if self._launcher is not None:
            await self._launcher.stop()
        if self._fork_server is not None:
            self._fork_server.close()

    def _ready(self) -> None:
        assert self._prepared is not None
        gc.freeze()
        gc.enable()
        config, server = self._config, self._prepared.flags.server
        infos = list(self.api.frontend.instances)
        self._console.banner(
            f"http{'s' if server.ssl_certfile else ''}://{config.host or '0.0.0.0'}:{config.port}",
            server.served_model_name[0],
            [f"{info.instance_id} (pid {info.pid})" for info in infos],
            needs_key=bool(config.api_key),
            no_migration=next(
                (no_moves(why, i.role) for i in infos if (why := i.engine.no_migration) is not None), None
            ),
        )
