"""What operators ask of the manager, through API servers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.requests import (
    DrainInstance,
    FindRequests,
    LoadAdapter,
    ManualMigration,
    MigrateByName,
    RestartInstances,
    ScalePools,
    UnloadAdapter,
)
from pd_serve.comm.rpc import RpcClient, RpcServer
from pd_serve.errors import EngineDeadError, MigrationRefusedError, UnknownTargetError
from pd_serve.manager.announcer import Announcer
from pd_serve.manager.lora_adapters import LoraAdapters
from pd_serve.manager.pool_sizes import PoolSizes
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.rolling_restart import RollingRestart
from pd_serve.manager.stopper import Stopper


class Operations:
    """Serves the calls of API servers. Each operation only begins here, and can be undone.

    It is answered when the instances have noted it: from then on it outlives this manager.

    Args:
        keep: Has the instances note the present state.
        calls: For calls of the other API servers.
    """

    def __init__(
        self,
        wire: MessageWire,
        register: InstanceRegister,
        stopper: Stopper,
        sizes: PoolSizes,
        restart: RollingRestart,
        adapters: LoraAdapters,
        announcer: Announcer,
        calls: RpcClient,
        keep: Callable[[], Awaitable[None]],
    ) -> None:
        self._register = register
        self._stopper = stopper
        self._sizes = sizes
        self._restart = restart
        self._announcer = announcer
        self._calls = calls
        self._keep = keep
        self._server = RpcServer(
            wire,
            {
                DrainInstance: self._kept(self._drain),
                ScalePools: self._kept(self._scale),
                RestartInstances: self._kept(self._restart_all),
                MigrateByName: self._migrate,
                FindRequests: self._find_requests,
                LoadAdapter: adapters.load,
                UnloadAdapter: adapters.unload,
            },
        )
        self.on_call = self._server.on_call

    async def close(self) -> None:
        await self._server.close()

    def _kept(self, begin: Callable[[Any], None]) -> Callable[[str, Any], Awaitable[None]]:
        async def serve(sender: str, request: Any) -> None:
            await self._keep()  # another manager may have taken over while this process stood still
            begin(request)
            await self._keep()

        return serve

    def _drain(self, request: DrainInstance) -> None:
        instance_id = request.instance_id
        if instance_id not in self._register:
            raise UnknownTargetError(f"no instance {instance_id!r}; see GET /cluster")
        if not request.draining:
            self._sizes.use_again(instance_id)
            self._stopper.drain(instance_id, False, "requested by the operator")
            return
        unused = self._stopper.drained_by_operator  # they may not have reported yet that they drain
        if (why := self._register.why_needed(instance_id, unused)) is not None:
            raise MigrationRefusedError(why)
        if request.stop and self._restart.is_replacing(instance_id):
            raise MigrationRefusedError(f"a restart replaces {instance_id}; cancel the restart first")
        self._stopper.drain(instance_id, True, "requested by the operator")
        if request.stop:
            self._sizes.stop_one(instance_id)

    def _scale(self, request: ScalePools) -> None:
        self._sizes.scale(request.sizes)

    def _restart_all(self, request: RestartInstances) -> None:
        if request.cancel:
            self._restart.cancel()
        else:
            self._restart.begin()

    async def _migrate(self, sender: str, request: MigrateByName) -> ManualMigration:
        """Calls the other API servers until one has the request."""
        for api_server in self._others(sender):
            try:
                return await self._calls.call(api_server, request)
            except UnknownTargetError:
                continue
            except EngineDeadError:
                if api_server in self._announcer.api_servers:
                    raise
        raise UnknownTargetError(f"no running request {request.request_id!r}")

    async def _find_requests(self, sender: str, request: FindRequests) -> list[dict[str, Any]]:
        calls = (self._calls.call(api_server, request) for api_server in self._others(sender))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [row for answer in answers if not isinstance(answer, BaseException) for row in answer]

    def _others(self, sender: str) -> list[str]:
        return [name for name in self._announcer.api_servers if name != sender]
