"""Ray, the manager, the instances and the scheduler of one `pd-serve serve`: all but its API servers."""

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.config import ServeConfig
from pd_serve.errors import PdServeError
from pd_serve.instance.engine_factory import CPU_ENGINE_MODULES, ENGINE_MODULES
from pd_serve.launch.console import Console
from pd_serve.launch.preparation import ModelSource, find_model, placements
from pd_serve.launch.ray_address import find_ray_cluster
from pd_serve.launch.signals import END_SIGNALS, end_on
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.platform.cpu import is_cpu_build
from pd_serve.platform.environment import ray_environment
from pd_serve.platform.fork_server import ForkServer
from pd_serve.platform.memory import check_memory
from pd_serve.platform.open_files import allow_many_open_files
from router.load import ROLES

if TYPE_CHECKING:
    from pd_serve.manager.ray_launcher import RayLauncher

#: Time for Ray to start or to be joined, in seconds: a few, unless the machine is very busy.
JOIN_S = 120.0


class LocalCluster:
    """Started by `prepare` and `start`, and ended by `stop`.

    Args:
        num_api_servers: API servers that this machine has memory for, too.

    Attributes:
        keys: Keys of its messages.
        host: Where its processes listen for messages; see `ManagerConfig.host`.
    """

    def __init__(self, config: ServeConfig, console: Console, num_api_servers: int = 1) -> None:
        self.keys = CurveKeys.of(config.cluster_secret)
        self.host = "127.0.0.1"
        self._config = config
        self._console = console
        self._num_api_servers = num_api_servers
        self._ray_address: str | None = None
        # All of them are awaited by `start`, which raises their errors: no error is logged besides.
        self._tasks = BackgroundTasks(on_failure=lambda error: None)
        self._launcher: RayLauncher | None = None
        self._fork_server: ForkServer | None = None
        self._manager: Manager | None = None

    @property
    def manager(self) -> Manager:
        """The manager, once `start` has returned."""
        assert self._manager is not None
        return self._manager

    async def prepare(self) -> ModelSource:
        """Finds the model and sets the environment of all processes. Raises: PdServeError."""
        config = self._config
        self._ray_address = await asyncio.to_thread(find_ray_cluster, config.ray_address)
        self._console.step(f"preparing the model {config.model}")
        model = await asyncio.to_thread(find_model, config)
        self._check_memory(model, {})  # before anything starts
        os.environ.update(ray_environment(config.ray_address))
        return model

    async def start(self, model: ModelSource, manager_config: Coroutine[Any, Any, ManagerConfig]) -> None:
        """Starts everything. Returns when the instances are ready.

        Args:
            manager_config: Awaited while Ray starts. Its `host` is set here.

        Raises:
            PdServeError: Something does not start.
        """
        config, console = self._config, self._console
        console.step("starting Ray and loading vLLM")
        preparing = self._tasks.start(manager_config)
        forks = self._start_fork_server()
        python = forks.python if forks is not None else None
        allow_many_open_files()
        per_process = config.instances_per_process
        launcher = await asyncio.to_thread(_new_launcher, self._ray_address, model, python, per_process)
        self._launcher = launcher
        try:
            async with asyncio.timeout(JOIN_S):
                await asyncio.to_thread(launcher.connect)
        except TimeoutError:
            where = config.ray_address or "this machine"
            raise PdServeError(f"Ray at {where} does not answer within {JOIN_S:g} s") from None
        end_on(*END_SIGNALS)  # Ray has replaced the handlers
        if forks is not None:
            await asyncio.to_thread(forks.wait)
        if is_cpu_build():  # importing takes longest: it goes on while the flags are parsed
            anywhere = placements(config, dict.fromkeys(ROLES, 1))
            for name, role in config.instance_roles:
                await launcher.launch(name, anywhere[role])
        if config.ray_address is not None:
            self.host = launcher.node_address()
        found = replace(await preparing, host=self.host)
        self._check_memory(model, found.engine_args["decode"])
        console.step(f"starting {config.num_instances} instances")
        self._manager = Manager(found, Wire(MANAGER, self.host, self.keys), launcher, console)
        await self._manager.start()
        self._tasks.start(_watch_head(console))

    async def watch(self) -> None:
        """Runs until cancelled where Ray is the service's own. Raises: PdServeError: it has ended."""
        if self._ray_address is None:
            from pd_serve.manager.ray_head import end_with_ray

            await end_with_ray(lambda: len(self.manager.register))

    async def stop(self) -> None:
        """Ends all processes, in about a second; a process that does not end by itself is killed."""
        if self._manager is not None:
            await self._manager.close()
        await self._tasks.cancel()
        if self._launcher is not None:
            await self._launcher.stop()
        if self._fork_server is not None:
            self._fork_server.close()

    def _start_fork_server(self) -> ForkServer | None:
        """Starts the process that instances are forked from, where they can be."""
        config = self._config
        if config.ray_address is not None or config.engine == "simulated" or not is_cpu_build():
            return None  # a process that may have touched a GPU must not fork
        self._fork_server = ForkServer((*ENGINE_MODULES, *CPU_ENGINE_MODULES))
        return self._fork_server

    def _check_memory(self, model: ModelSource, engine_args: dict[str, Any]) -> None:
        """Raises: InvalidRequestError: this machine has too little memory for all processes."""
        config = self._config
        if config.ray_address is None or not engine_args:
            check_memory(
                config.num_instances,
                engine_args,
                model.path,
                simulated=config.simulated is not None,
                api_servers=self._num_api_servers,
                per_process=config.instances_per_process,
            )


def _new_launcher(
    address: str | None, model: ModelSource, python: str | None, per_process: int
) -> "RayLauncher":
    """Imports Ray, which takes a second."""
    from pd_serve.manager.ray_launcher import RayLauncher

    return RayLauncher(address, model.environment, python=python, instances_per_process=per_process)


async def _watch_head(console: Console) -> None:
    """Imports Ray, as above."""
    from pd_serve.manager.ray_head import watch_head

    await watch_head(console)
