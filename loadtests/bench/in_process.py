"""A service whose API server is in the process that measures, which calls it without HTTP."""

import asyncio
import gc

from pd_serve.comm.wire import Wire
from pd_serve.config import ServeConfig
from pd_serve.launch.api_server import ApiServer, import_api_modules
from pd_serve.launch.console import Console
from pd_serve.launch.local_cluster import LocalCluster
from pd_serve.launch.preparation import parse
from pd_serve.manager.manager_config import ManagerConfig


class InProcessService:
    """Instances, manager and one API server, which nothing listens for."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._cluster = LocalCluster(config, Console())
        self._api: ApiServer | None = None

    @property
    def api(self) -> ApiServer:
        """The API server, once `start` has returned."""
        assert self._api is not None
        return self._api

    async def start(self) -> None:
        """Raises: PdServeError: it does not start."""
        gc.disable()  # as in the processes of a service
        cluster = self._cluster
        model = await cluster.prepare()
        parsing = asyncio.create_task(asyncio.to_thread(parse, self._config, model))

        async def manager_config() -> ManagerConfig:
            return (await parsing).manager_config("", cluster.keys)

        await cluster.start(model, manager_config())
        await asyncio.to_thread(import_api_modules)

        async def find_manager() -> str:
            return cluster.manager.address

        wire = Wire("api-bench", cluster.host, cluster.keys)
        self._api = await ApiServer.start(await parsing, wire, find_manager)
        gc.freeze()
        gc.enable()

    async def stop(self) -> None:
        if self._api is not None:
            await self._api.close()
        await self._cluster.stop()
