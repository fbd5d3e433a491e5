"""The service's life: prepare, start everything, serve, stop everything."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from migration.errors import EngineDeadError
from migration.tasks import OwnedTasks
from pd_serve import models
from pd_serve.api.server import bind, serve
from pd_serve.config import (
    CPU_PREFILL_CHUNK_TOKENS,
    CPU_STAGE_BYTES_PER_S,
    ServeConfig,
    check_memory,
    cpu_engine_defaults,
    is_cpu_build,
    process_environment,
)
from pd_serve.console import Console
from pd_serve.instance import InstanceConfig, InstanceInfo
from pd_serve.scheduler_process import SchedulerConfig
from pd_serve.simulation.config import EngineSettings
from pd_serve.wire import CurveKeys, Wire
from router.book import LoadBook

logger = logging.getLogger(__name__)

#: Below it most vocabularies have control tokens and single bytes; smaller ones are made of bytes.
FIRST_WORD = 1000

#: A scheduler that dies sooner would die again at once: the next one waits a little.
SCHEDULER_LIFE_S = 10.0


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
    service = Service(replace(config, port=sock.getsockname()[1]), console, catch_signals)
    try:
        await service.start()
        await service.serve(sock)
    except asyncio.CancelledError:
        console.step("stopping")
    finally:
        sock.close()
        await service.stop()
        console.step("stopped")


class Service:
    """Everything that one `pd-serve serve` starts, and ends again."""

    def __init__(self, config: ServeConfig, console: Console, catch_signals: Callable[[], None]) -> None:
        self._config = config
        self._catch_signals = catch_signals
        self._console = console
        # All of them are awaited by `start`, which raises their errors; nothing is to be logged besides.
        self._tasks = OwnedTasks(on_failure=lambda error: None)
        self._background = OwnedTasks()
        self._cluster: Any = None
        self.router: Any = None
        self.fleet: Any = None
        self.client: Any = None
        self._wire: Wire | None = None
        self._infos: list[InstanceInfo] = []
        self._flags: Any = None
        self._num_gpus = 0.0

    async def start(self) -> None:
        config, console = self._config, self._console
        gc.disable()  # as in the instances: collecting while importing costs a tenth of the time
        console.step(f"preparing the model {config.model}")
        self._model = await asyncio.to_thread(models.resolve, config.model)
        self._environment = environment = process_environment(config, self._model)
        os.environ.update(environment)
        check_memory(config.num_instances, {}, self._model)  # the least it takes, before anything starts

        from pd_serve.cluster import RayCluster

        self._cluster = RayCluster(config.ray_address, environment, self._on_lost)
        console.step("starting Ray and loading vLLM")
        parsing = self._tasks.start(asyncio.to_thread(self._parse_flags))
        await asyncio.to_thread(self._cluster.connect)
        self._catch_signals()  # Ray has put its own handlers in their place
        if is_cpu_build():
            self._launch()  # importing takes longest: it goes on while the flags are read
        self._flags = await parsing
        if not is_cpu_build():
            self._num_gpus = float(self._flags.server.tensor_parallel_size)
            self._launch()
        check_memory(config.num_instances, self._flags.engine("decode"), self._model)
        local = config.ray_address is None
        self._host = "127.0.0.1" if local else self._cluster.node_address()
        secret = config.cluster_secret
        self._keys = CurveKeys.generate() if secret is None else CurveKeys.derive(secret)
        console.step(f"starting {config.num_instances} instances")
        starts = [self._tasks.start(self._start_instance(name, role)) for name, role in config.names()]
        self._wire = Wire(f"api-{os.getpid()}", self._host, self._keys)
        await asyncio.to_thread(self._import_front_end)
        self._infos = list(await asyncio.gather(*starts))
        console.step("opening the API")
        await self._build_app()

    async def serve(self, sock: Any) -> None:
        await serve(
            self._app,
            sock,
            self._flags.server,
            on_ready=self._ready,
            max_connections=self._config.max_connections,
        )

    async def stop(self) -> None:
        """Ends everything that was started, in about a second; whatever resists is killed."""
        await self._background.cancel()
        if self.fleet is not None:
            await self.fleet.close()
        await self._tasks.cancel()
        if self.router is not None:
            await self.router.close()
        if self._cluster is not None:
            await self._cluster.stop()
        if self._wire is not None:
            await self._wire.close()

    # ---- starting

    def _parse_flags(self) -> Any:
        from pd_serve.engine_flags import parse

        config = self._config
        defaults: dict[str, Any] = {
            "model": self._model,
            "served_model_name": [config.served_model_name or models.served_name(config.model)],
            "host": config.host,
            "port": config.port,
        }
        if config.api_keys:
            defaults["api_key"] = list(config.api_keys)
        if (dtype := models.default_dtype(config.model)) is not None:
            defaults["dtype"] = dtype
        role_defaults: dict[str, dict[str, Any]] = {}
        if is_cpu_build():
            defaults |= cpu_engine_defaults()
            role_defaults["prefill"] = {"max_num_batched_tokens": CPU_PREFILL_CHUNK_TOKENS}
        flags = parse(config.engine_flags, defaults, role_defaults)
        # Refuses what does not fit together before anything is started, and fills vLLM's cache of model
        # inspections, which every instance would otherwise do for itself.
        self._engine_config = flags.engine_config("decode" if config.instances["decode"] else "neutral")
        return flags

    @property
    def _simulated(self) -> EngineSettings | None:
        """What the engines are like, if simulated: they say plain words of the model's vocabulary."""
        if self._config.simulated is None:
            return None
        size = self._engine_config.model_config.get_vocab_size()
        words = (ord("a"), 26) if size < FIRST_WORD else (FIRST_WORD, size - FIRST_WORD)
        return replace(self._config.simulated, vocabulary=words)

    def _launch(self) -> None:
        for name, _ in self._config.names():
            self._cluster.launch(name, self._num_gpus)

    async def _start_instance(self, name: str, role: str) -> InstanceInfo:
        rate = CPU_STAGE_BYTES_PER_S if is_cpu_build() else None
        instance = InstanceConfig(
            name,
            role,
            self._flags.engine(role),
            self._host,
            self._keys,
            self._environment,
            rate,
            self._simulated,
        )
        info: InstanceInfo = await self._cluster.start(instance)
        self._console.step(f"{name} is ready (pid {info.pid})")
        if info.no_migration is not None:
            self._console.warn(f"{name} SERVES WITHOUT MIGRATION: {info.no_migration}")
        return info

    async def _start_another(self, name: str, role: str) -> InstanceInfo:
        """One more instance, while serving."""
        check_memory(1, self._flags.engine(role), self._model)
        self._cluster.launch(name, self._num_gpus)
        return await self._start_instance(name, role)

    async def _keep_scheduler(self) -> None:
        """Always one scheduler: the next as soon as one has died, unless they die at once."""
        config = SchedulerConfig(self._config.policies, self._config.autoscale, self._host, self._keys)
        loop, pause_s = asyncio.get_running_loop(), 0.0
        while True:
            await asyncio.sleep(pause_s)
            began = loop.time()
            try:
                address, pid = await self._cluster.start_scheduler(config)
                self.fleet.scheduler_started(address, pid)
                await self._cluster.scheduler_ended()
                self._console.warn("the scheduler has died and is started again; requests go on")
            except EngineDeadError as error:
                self._console.warn(f"{error}; nothing is moved or scaled")
            self.fleet.scheduler_lost()
            pause_s = 0.0 if loop.time() - began > SCHEDULER_LIFE_S else min(pause_s + 1.0, 10.0)

    def _import_front_end(self) -> None:
        import pd_serve.api.app
        import pd_serve.api.codec
        import pd_serve.api.core
        import pd_serve.fleet
        import pd_serve.request_router  # noqa: F401

    async def _build_app(self) -> None:
        from pd_serve.api.app import create_app
        from pd_serve.api.codec import VllmCodec
        from pd_serve.api.core import ClusterCore
        from pd_serve.api.engine_client import ClusterAsyncLLM
        from pd_serve.fleet import Fleet
        from pd_serve.observe.exposition import show_metrics
        from pd_serve.observe.recorder import RequestRecorder
        from pd_serve.observe.request_metrics import RequestMetrics
        from pd_serve.request_router import RequestRouter

        assert self._wire is not None
        server = self._flags.server
        # What an instance found out when it made its KV cache, as vLLM's own front end takes it over.
        self._engine_config.cache_config.num_gpu_blocks = self._infos[0].num_blocks
        self._engine_config.cache_config.block_size = self._infos[0].block_tokens
        self._engine_config.model_config.max_model_len = min(info.max_model_len for info in self._infos)
        codec = VllmCodec()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        config = self._config
        recorder = RequestRecorder([RequestMetrics()], unix_offset_s=time.time() - time.monotonic())
        self.router = RequestRouter(
            self._wire.name,
            self._wire,
            codec,
            outputs.put_nowait,
            block_tokens=self._infos[0].block_tokens,
            num_slots=config.max_instances,
            on_scaling=lambda wanted: self.fleet.on_scaling(wanted),
            on_decided=lambda report: self.fleet.on_decided(report),
            on_silent=self._on_silent,
            book=LoadBook(config.policies, clock=asyncio.get_running_loop().time),
            recorder=recorder,
        )
        self.fleet = Fleet(
            self.router,
            self._start_another,
            self._cluster.stop_instance,
            max_instances=config.max_instances,
            instances=config.instances,
            policy=config.policies.name,
        )
        for info in self._infos:
            self.router.join(info)
        self._background.start(self._keep_scheduler())
        async with asyncio.timeout(30):
            await self.router.wait_for_reports()
        core = ClusterCore(self.router, outputs, codec, tuple(self._infos[0].supported_tasks))
        check: Any = None
        if config.simulated is not None:
            from pd_serve.simulation.live import check_parameters

            check = check_parameters
        self.client = ClusterAsyncLLM(
            self._engine_config,
            core,
            log_requests=server.enable_log_requests,
            log_stats=not server.disable_log_stats,
            check=check,
        )
        self._app = await create_app(
            server,
            self.client,
            self.fleet,
            max_waiting=config.max_waiting,
            admin_key=config.admin_key,
            max_body_bytes=config.max_body_bytes,
        )
        show_metrics(self._app, self.router.reports)

    def _on_lost(self, instance_id: str) -> None:
        self._console.warn(f"{instance_id} has died; its requests are recomputed elsewhere")
        if self.router is not None:
            self.router.leave(instance_id)

    def _on_silent(self, instance_id: str) -> None:
        """Its process may hang: nothing of it is to come to life again."""
        self._console.warn(f"{instance_id} hangs and is ended; its requests are recomputed elsewhere")
        self.router.leave(instance_id)
        self._background.start(self._cluster.stop_instance(instance_id))

    def _ready(self) -> None:
        gc.freeze()
        gc.enable()
        config = self._config
        name = self._flags.server.served_model_name[0]
        self._console.banner(config, name, self._infos, tls=bool(self._flags.server.ssl_certfile))
