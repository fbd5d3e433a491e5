"""`pd-serve serve`: starts all processes, keeps the API servers running, and stops everything.

The manager runs in this process, and API servers are its children: this process loads no vLLM.
"""

import asyncio
import os
import socket

from pd_serve.api.server import bind
from pd_serve.config import ServeConfig
from pd_serve.instance.engine_factory import no_moves
from pd_serve.launch.api_server_child import SpawnedApiServer
from pd_serve.launch.api_server_keeper import ApiServerKeeper
from pd_serve.launch.api_server_messages import ApiServerSettings, FlagsParsed, JoinCluster
from pd_serve.launch.console import Console, service_url
from pd_serve.launch.flag_table import vllm_version
from pd_serve.launch.local_cluster import LocalCluster
from pd_serve.launch.preparation import ModelSource
from pd_serve.launch.signals import END_SIGNALS, end_on
from pd_serve.manager.manager_config import ManagerConfig


async def run(config: ServeConfig, console: Console) -> None:
    """Serves until SIGINT or SIGTERM. Raises: PdServeError: with one line that says what to change."""
    end_on(*END_SIGNALS)
    vllm_version()  # a clear error at once, if vLLM is not installed
    sock = bind(config.host, config.port)
    config = config.model_copy(update={"port": sock.getsockname()[1]})
    service = LocalService(config, console, sock)
    try:
        await service.start()
        await service.keep()
    except asyncio.CancelledError:
        console.step("stopping")
    finally:
        await service.stop()
        console.step("stopped")


class LocalService:
    """All that one `pd-serve serve` starts, and ends again.

    Args:
        sock: Bound to the service's port, and not listening. API servers listen on it. `stop` closes it.
    """

    def __init__(self, config: ServeConfig, console: Console, sock: socket.socket) -> None:
        self._config = config
        self._console = console
        self._sock = sock
        self._number = config.num_api_servers(os.cpu_count() or 1)
        self._cluster = LocalCluster(config, console, self._number)
        self._keeper: ApiServerKeeper | None = None

    async def start(self) -> None:
        """Returns when all API servers serve. Raises: PdServeError."""
        cluster = self._cluster
        model = await cluster.prepare()
        keeper = self._keeper = ApiServerKeeper(
            self._number, lambda name: self._spawn(name, model), self._console
        )
        flags: list[FlagsParsed] = []

        async def manager_config() -> ManagerConfig:
            flags.append(await keeper.start())
            return flags[0].manager_config

        await cluster.start(model, manager_config())
        announcer = cluster.manager.announcer
        keeper.on_ended, announcer.on_silent = announcer.drop_ended, keeper.end
        self._console.step("opening the API")
        await keeper.join(JoinCluster(cluster.host, cluster.manager.address))
        self._show_banner(flags[0])

    async def keep(self) -> None:
        """Keeps the API servers running until cancelled.

        Raises:
            PdServeError: None starts any more, or the service's own Ray has ended.
        """
        assert self._keeper is not None
        await asyncio.gather(self._keeper.keep(), self._cluster.watch())

    async def stop(self) -> None:
        """Ends all processes: API servers after their requests, in a bounded time, then the others."""
        self._sock.close()
        if self._keeper is not None:
            await self._keeper.stop()
        await self._cluster.stop()

    async def _spawn(self, name: str, model: ModelSource) -> SpawnedApiServer:
        settings = ApiServerSettings(name, self._config, model, self._cluster.keys)
        return await SpawnedApiServer.start(settings, self._sock, os.getpid())

    def _show_banner(self, flags: FlagsParsed) -> None:
        config = self._config
        infos = self._cluster.manager.register.in_order()
        self._console.banner(
            service_url(config.host, config.port, tls=flags.uses_tls),
            flags.served_model_name,
            infos,
            needs_key=bool(config.api_key),
            no_migration=next(
                (no_moves(why, i.role) for i in infos if (why := i.engine.no_migration) is not None), None
            ),
        )
