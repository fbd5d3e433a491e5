"""One serving instance: a process with vLLM's engine, its llumlet and their sockets."""

import asyncio
import gc
import logging
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from migration.bounds import MigrationBounds
from migration.messages import InstanceId
from pd_serve.comm.messages import InstanceInfo, TokenHeader
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.config import is_cpu_build
from pd_serve.simulated_engine.settings import EngineSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """What an instance is started with. Plain values: it travels through Ray.

    Attributes:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        host: Address that this instance's sockets bind to.
        keys: The cluster's key pair.
        stage_bytes_per_s: See `MigrationBounds`.
        simulated: A simulated engine instead of vLLM's, and what it is like.
    """

    instance_id: str
    role: str
    engine_args: dict[str, Any]
    host: str
    keys: CurveKeys
    environment: dict[str, str] = field(default_factory=dict)
    stage_bytes_per_s: float | None = None
    simulated: EngineSettings | None = None


class Instance:
    """Started once; when its engine dies the whole process ends, so that nothing half-alive is left."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()
        self._loaded: asyncio.Future[None] | None = None
        self._config: InstanceConfig | None = None

    async def load(self) -> None:
        """Imports vLLM and the transport: seconds of CPU, so it begins before the configuration is known."""
        if self._loaded is None:
            self._loaded = asyncio.ensure_future(asyncio.to_thread(_import_engine))
        await self._loaded

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Loads the model and opens the sockets. Raises: whatever vLLM raises."""
        os.environ.update(config.environment)
        await self.load()
        from migration.transport.nixl import NixlTransport
        from pd_serve.instance.llumlet import Llumlet

        name = InstanceId(config.instance_id)
        self._config = config
        self._wire = Wire(name, config.host, config.keys)
        self._transport = NixlTransport(name)
        bounds = MigrationBounds(stage_bytes_per_s=config.stage_bytes_per_s)
        self.llumlet = Llumlet(
            name, config.role, self._wire, self._transport, bounds=bounds, on_fatal=self._die
        )
        self._tokens = TokenPublisher(name, self._wire)
        self._engine = self._make_engine(config.simulated)
        await self._engine.start()
        gc.enable()
        facts = self._engine.facts
        if facts.no_migration is None:
            self._transport.register(self._engine.regions)
        tasks = await self._engine.utility("get_supported_tasks")
        self.llumlet.start(self._engine)
        logger.debug("%s (%s) is ready, pid %d", name, config.role, os.getpid())
        return InstanceInfo(
            instance_id=name,
            role=config.role,
            address=self.llumlet.address,
            node=socket.gethostname(),
            pid=os.getpid(),
            no_migration=facts.no_migration,
            supported_tasks=list(tasks),
            max_model_len=facts.max_model_len,
            num_blocks=facts.num_blocks,
            block_tokens=facts.block_tokens,
        )

    async def wait(self) -> None:
        """Returns when the instance has been stopped."""
        await self._stopped.wait()

    async def stop(self) -> None:
        """Ends everything it holds: sockets, engine thread, shared memory."""
        if self._config is not None:
            await self.llumlet.close()
            await self._engine.stop()
            self._transport.close()
            self._tokens.close()
            await self._wire.close()
        self._stopped.set()

    def _make_engine(self, simulated: EngineSettings | None) -> Any:
        if simulated is not None:
            from pd_serve.simulated_engine.vllm_format import make_engine

            return make_engine(simulated, self._tokens.publish, self.llumlet.events)
        from migration.vllm_engine.adapter import VllmEngine

        return VllmEngine(self._engine_config, self._tokens.publish, self.llumlet.events)

    def _engine_config(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        assert self._config is not None
        # The context decides a few defaults (batch sizes on GPUs): those that vLLM's own server has.
        context = UsageContext.ENGINE_CONTEXT if is_cpu_build() else UsageContext.OPENAI_API_SERVER
        return AsyncEngineArgs(**self._config.engine_args).create_engine_config(context)

    def _die(self, error: BaseException) -> None:
        logger.critical("this instance ends: %s", error, exc_info=error)
        self._transport.close()
        os._exit(1)


def _import_engine() -> None:
    """Collecting garbage while importing costs a tenth of it, and vLLM collects five times while it
    starts: with all modules' objects frozen, 1.4 s of CPU less per instance (measured)."""
    gc.disable()
    # The step thread, the loop and the transport's thread take turns often: at Python's 5 ms a copy of
    # one block would wait up to 37 ms for them (measured: 2.5 ms at 0.2 ms).
    sys.setswitchinterval(0.0005)
    import migration.transport.nixl
    import migration.vllm_engine.adapter  # noqa: F401
    import pd_serve.instance.llumlet  # noqa: F401

    gc.freeze()


class TokenPublisher:
    """Sends every step's outputs to the API servers, one message each. Belongs to the step thread."""

    def __init__(self, name: str, wire: Wire) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self._name = name
        self._wire = wire
        self._encoder = MsgpackEncoder()
        self._sockets: dict[str, Any] = {}

    def publish(self, client: str, outputs: Any, spans: list[tuple[int, int]]) -> None:
        import msgspec
        import zmq

        socket = self._sockets.get(client)
        if socket is None:
            socket = self._sockets[client] = self._wire.publisher(client)
        frames = [msgspec.msgpack.encode(TokenHeader(self._name, spans)), *self._encoder.encode(outputs)]
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("API server %s does not read its tokens", client)

    def close(self) -> None:
        """Once the step thread has ended; an open socket would hold up the wire's end."""
        for publisher in self._sockets.values():
            publisher.close(linger=0)
