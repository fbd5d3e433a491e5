"""One serving instance: an engine, its llumlet and their sockets. Simulated ones may share a process."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from migration.bounds import MigrationBounds
from migration.engine_interface import Engine
from migration.messages import InstanceId
from migration.transport.kv_transport import KvTransport
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.errors import EngineDeadError, InvalidRequestError
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
    """An instance, which is started once.

    Args:
        has_others: Whether other instances live in the process of this one. If there are none, an unexpected
            failure ends the process. Otherwise it ends this instance only, whose memory has to stay until the
            process ends: something may still be written to it.
    """

    def __init__(self, has_others: Callable[["Instance"], bool] = lambda instance: False) -> None:
        self._has_others = has_others
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._abandoning: asyncio.Task[None] | None = None
        #: What closes its parts, in the order in which they were created.
        self._closers: list[Callable[[], Awaitable[None]]] = []

    @property
    def has_ended(self) -> bool:
        """It has stopped or failed."""
        return self._ended.is_set() or self._failure is not None

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
        self._wire = Wire(name, config.host, config.keys)
        self._closers.append(self._wire.close)
        bounds = MigrationBounds(stage_bytes_per_s=config.stage_bytes_per_s)
        self._tokens = TokenPublisher(name, self._wire)
        self._closers.append(_closing(self._tokens.close))
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
        self._closers.append(self._engine.stop)
        await self._engine.start()
        gc.enable()
        facts = self._engine.facts
        if config.needs_migration and facts.no_migration is not None:
            await self.stop()
            raise InvalidRequestError(no_handoffs(facts.no_migration))
        transport = await open_transport(name, self._engine, self._die)
        self._closers.append(_closing(transport.close))  # before workers end, which would be a failure of it
        self.llumlet.start(self._engine, transport)
        self._closers.append(self.llumlet.close)
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
        """Returns when the instance has been stopped. Raises: EngineDeadError: it has failed."""
        await self._ended.wait()
        if self._failure is not None:
            raise EngineDeadError(f"{type(self._failure).__name__}: {self._failure}") from self._failure

    async def stop(self) -> None:
        """Stops the engine and frees sockets and shared memory. Idempotent; a start may be incomplete."""
        while self._closers:
            await self._closers.pop()()
        self._ended.set()

    def _die(self, error: BaseException) -> None:
        """Ends the process, or the instance, at once; from any thread.

        The kernel frees the memory, sockets and connections of a process.
        """
        logger.critical("this instance ends: %s", error, exc_info=error)
        self._failure = self._failure or error
        if self._has_others(self):
            self._loop.call_soon_threadsafe(self._fail)
        else:
            os._exit(1)

    def _fail(self) -> None:
        if self._abandoning is None:
            self._abandoning = self._loop.create_task(self._abandon())

    async def _abandon(self) -> None:
        """Ends the instance in a state that may be wrong, steps and messages first. Closing may fail."""
        with contextlib.suppress(Exception):
            await self._engine.stop()
            self._tokens.close()
            await self._wire.close()
        self._ended.set()
        while self._closers:
            with contextlib.suppress(Exception):
                await self._closers.pop()()


def _closing(close: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def closed() -> None:
        close()

    return closed
