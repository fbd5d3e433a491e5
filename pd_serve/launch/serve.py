"""`pd-serve serve`: prepare, start everything, serve, stop everything, in one process with the API server."""

import asyncio
import gc
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

from migration.tasks import BackgroundTasks
from pd_serve.api.server import bind, serve
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.config import ServeConfig, check_memory, is_cpu_build
from pd_serve.launch.api_server import ApiServer, import_all
from pd_serve.launch.console import Console
from pd_serve.launch.preparation import Prepared, find_model, parse, placements
from pd_serve.manager.manager import Manager


async def run(config: ServeConfig, console: Console) -> None:
    """Serves until SIGINT or SIGTERM. Raises: PdServeError: with one line that says what to change."""
    main = asyncio.current_task()
    assert main is not None
    loop = asyncio.get_running_loop()

    def catch_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, main.cancel)

    catch_signals()
    sock = bind(config.host, config.port)
    service = LocalService(replace(config, port=sock.getsockname()[1]), console, catch_signals)
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
    """Everything that one `pd-serve serve` starts, and ends again."""

    def __init__(self, config: ServeConfig, console: Console, catch_signals: Callable[[], None]) -> None:
        self._config = config
        self._catch_signals = catch_signals
        self._console = console
        # All of them are awaited by `start`, which raises their errors; nothing is to be logged besides.
        self._tasks = BackgroundTasks(on_failure=lambda error: None)
        self._cluster: Any = None
        self._owner: Manager | None = None
        self._front_end: ApiServer | None = None
        self._prepared: Prepared | None = None

    @property
    def router(self) -> Any:
        """The API server's request router, for measurements. So `client`, its engine client."""
        assert self._front_end is not None
        return self._front_end.router

    @property
    def client(self) -> Any:
        assert self._front_end is not None
        return self._front_end.client

    async def start(self) -> None:
        config, console = self._config, self._console
        gc.disable()  # as in the instances: collecting while importing costs a tenth of the time
        console.step(f"preparing the model {config.model}")
        model, environment = await asyncio.to_thread(find_model, config)
        check_memory(config.num_instances, {}, model)  # the least it takes, before anything starts

        from pd_serve.manager.ray_launcher import RayLauncher

        self._cluster = RayLauncher(config.ray_address, environment)
        console.step("starting Ray and loading vLLM")
        parsing = self._tasks.start(asyncio.to_thread(parse, config, model, environment))
        await asyncio.to_thread(self._cluster.connect)
        self._catch_signals()  # Ray has put its own handlers in their place
        if is_cpu_build():  # importing takes longest: it goes on while the flags are read
            for name, role in config.names():
                self._cluster.launch(name, placements(config, 1)[role])
        prepared = self._prepared = await parsing
        local = config.ray_address is None
        if local:
            check_memory(config.num_instances, prepared.flags.engine("decode"), model)
        host = "127.0.0.1" if local else self._cluster.node_address()
        keys = CurveKeys.of(config.cluster_secret)
        console.step(f"starting {config.num_instances} instances")
        owner = self._owner = Manager(prepared.manager_config(host, keys), self._cluster, console)
        starting = self._tasks.start(owner.start(config.names()))

        async def find_manager() -> str:
            return owner.address

        await asyncio.to_thread(import_all)
        wire = Wire(f"api-{uuid4().hex[:8]}", host, keys)
        self._front_end = ApiServer(config, wire, find_manager, prepared.flags, prepared.engine_config)
        await starting
        console.step("opening the API")
        await self._front_end.start()

    async def serve(self, sock: Any) -> None:
        assert self._front_end is not None
        assert self._prepared is not None
        await serve(
            self._front_end.app,
            sock,
            self._prepared.flags.server,
            on_ready=self._ready,
            max_connections=self._config.max_connections,
        )

    async def stop(self) -> None:
        """Ends everything that was started, in about a second; whatever resists is killed."""
        if self._owner is not None:
            await self._owner.close()
        await self._tasks.cancel()
        if self._front_end is not None:
            await self._front_end.close()
        if self._cluster is not None:
            await self._cluster.stop()

    def _ready(self) -> None:
        assert self._prepared is not None
        gc.freeze()
        gc.enable()
        server = self._prepared.flags.server
        instances = list(self.router.instances)
        self._console.banner(
            self._config, server.served_model_name[0], instances, tls=bool(server.ssl_certfile)
        )
