"""One serving instance: a process with vLLM's engine, its llumlet and their sockets."""

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from migration.bounds import MigrationBounds
from migration.engine_interface import Engine
from migration.messages import InstanceId
from migration.transport.kv_transport import KvTransport
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.errors import InvalidRequestError
from pd_serve.instance.engine_factory import create_engine, import_engine, no_handoffs
from pd_serve.simulated_engine.settings import EngineSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """Configuration of an instance. Plain values: Ray serializes it.

    Attributes:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        host: Address that this instance's sockets bind to.
        keys: The cluster's key pair.
        stage_bytes_per_s: See `MigrationBounds`.
        simulated: Settings of a simulated engine, which replaces vLLM's; None for vLLM's.
        needs_migration: The instance does not start if its engine cannot move requests.
        orphan_s: See `pd_serve.instance.orphans`.
        itl_target_s: See `pd_serve.instance.load_reporter`.
    """

    instance_id: str
    role: str
    engine_args: dict[str, Any]
    host: str
    keys: CurveKeys
    environment: dict[str, str] = field(default_factory=dict)
    stage_bytes_per_s: float | None = None
    simulated: EngineSettings | None = None
    needs_migration: bool = False
    orphan_s: float = 0.0
    itl_target_s: float = 0.0


async def open_transport(
    name: InstanceId, engine: Engine, on_failure: Callable[[BaseException], None]
) -> KvTransport:
    """The transport of an engine's KV memory: in this process, or in those of the engine's workers.

    Args:
        on_failure: Called, in any thread, when it is not known any more which blocks are written to. Has to
            end the process.
    """
    from migration.transport.nixl import NixlTransport
    from migration.transport.ranked import RankedTransport, open_workers

    if engine.workers:
        return await open_workers(name, engine.workers, on_failure)
    transport = NixlTransport(name, on_failure=on_failure)
    if engine.facts.no_migration is None:
        transport.register(engine.regions)
    return RankedTransport([transport])


class Instance:
    """An instance, which is started once. When its engine dies, the whole process ends."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()
        self._config: InstanceConfig | None = None
        self._transport: KvTransport | None = None

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Loads the model and opens the sockets.

        Raises:
            InvalidRequestError: The engine cannot move requests, and has to.
            Exception: The errors of vLLM's start.
        """
        os.environ.update(config.environment)
        await asyncio.to_thread(import_engine, simulated=config.simulated is not None)
        from pd_serve.instance.llumlet import Llumlet
        from pd_serve.instance.token_publisher import TokenPublisher

        name = InstanceId(config.instance_id)
        self._config = config
        self._wire = Wire(name, config.host, config.keys)
        bounds = MigrationBounds(stage_bytes_per_s=config.stage_bytes_per_s)
        self._tokens = TokenPublisher(name, self._wire)
        self.llumlet = Llumlet(
            name,
            config.role,
            self._wire,
            self._tokens,
            bounds=bounds,
            orphan_s=config.orphan_s,
            itl_target_s=config.itl_target_s,
            on_fatal=self._die,
        )
        self._engine: Engine = create_engine(
            config.engine_args, config.simulated, self._tokens.publish, self.llumlet.events, config.orphan_s
        )
        await self._engine.start()
        gc.enable()
        facts = self._engine.facts
        if config.needs_migration and facts.no_migration is not None:
            await self.stop()
            raise InvalidRequestError(no_handoffs(facts.no_migration))
        self._transport = await open_transport(name, self._engine, self._die)
        self.llumlet.start(self._engine, self._transport)
        logger.debug("%s (%s) is ready, pid %d", name, config.role, os.getpid())
        return InstanceInfo(
            instance_id=name,
            role=config.role,
            address=self.llumlet.address,
            node=socket.gethostname(),
            pid=os.getpid(),
            engine=facts,
        )

    async def wait(self) -> None:
        """Returns when the instance has been stopped."""
        await self._stopped.wait()

    async def stop(self) -> None:
        """Stops the engine thread and frees sockets and shared memory."""
        if self._config is not None:
            await self.llumlet.close()
            if self._transport is not None:
                self._transport.close()  # before workers end, which would be a failure of it
            await self._engine.stop()
            self._tokens.close()
            await self._wire.close()
        self._stopped.set()

    def _die(self, error: BaseException) -> None:
        """Ends the process at once, from any thread. The kernel frees its memory, sockets and connections."""
        logger.critical("this instance ends: %s", error, exc_info=error)
        os._exit(1)
