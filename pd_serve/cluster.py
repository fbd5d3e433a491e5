"""Starting, watching and stopping processes. The only place of the service that knows Ray."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import ray

from migration.errors import EngineDeadError, PdServeError
from migration.tasks import OwnedTasks
from pd_serve.instance import Instance, InstanceConfig, InstanceInfo
from pd_serve.logs import configure_logging
from pd_serve.scheduler_process import SCHEDULER, SchedulerConfig, SchedulerProcess
from pd_serve.wire import Wire, is_local

logger = logging.getLogger(__name__)

#: How long instances may take to end by themselves before they are killed.
STOP_S = 3.0

#: A local cluster serves one purpose and ends with its owner: leave out what costs start-up time.
LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_worker_niceness": "0",  # the workers are the service, not batch jobs beside it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class InstanceActor:
    """Ray's view of an instance: an async actor, one process."""

    def __init__(self, name: str) -> None:
        self._name = name
        configure_logging()
        self._instance = Instance()

    def __repr__(self) -> str:
        return self._name  # Ray puts it in front of every line of log

    async def load(self) -> None:
        await self._instance.load()

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        return await self._instance.start(replace(config, host=_own_address(config.host)))

    async def wait(self) -> None:
        """Returns when the instance was stopped; fails at once when its process dies."""
        await self._instance.wait()

    async def stop(self) -> None:
        await self._instance.stop()


class SchedulerActor:
    """The scheduler's process. It imports neither vLLM nor torch, and is ready in about a second."""

    def __init__(self) -> None:
        configure_logging()
        self._stopped = asyncio.Event()

    def __repr__(self) -> str:
        return SCHEDULER

    async def start(self, config: SchedulerConfig) -> tuple[str, int]:
        """Returns its address and its process id."""
        self._wire = Wire(SCHEDULER, _own_address(config.host), config.keys)
        self._scheduler = SchedulerProcess(
            SCHEDULER,
            self._wire,
            config.policies,
            autoscale=config.autoscale or None,
            on_failure=self._die,
        )
        return self._scheduler.address, os.getpid()

    async def wait(self) -> None:
        """Returns when the scheduler was stopped; fails at once when its process dies."""
        await self._stopped.wait()

    async def stop(self) -> None:
        await self._scheduler.close()
        await self._wire.close()
        self._stopped.set()

    def _die(self, error: BaseException) -> None:
        logger.critical("the scheduler ends: %s", error, exc_info=error)
        os._exit(1)


class RayCluster:
    """The instances of one service, and its scheduler.

    Args:
        address: An existing cluster's address; None starts a local one that ends with this process.
        environment: What every instance's process finds in its environment.
        on_lost: Called with the id of an instance whose process has died.
    """

    def __init__(
        self, address: str | None, environment: dict[str, str], on_lost: Callable[[str], None]
    ) -> None:
        self._address = address
        self._environment = environment
        self._on_lost = on_lost
        self._actors: dict[str, Any] = {}
        self._scheduler: Any = None
        self._pids: dict[str, int] = {}
        self._watchers = OwnedTasks()

    def connect(self) -> None:
        """Starts or joins Ray. Blocks for seconds. Raises: PdServeError: no cluster at that address."""
        local = self._address is None
        if local:
            for name, value in LOCAL_SETTINGS.items():
                os.environ.setdefault(name, value)
            if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
                # Ray's ports ask for it. Ray's own way is one token for ever, in a file that others can read.
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        try:
            ray.init(
                address=self._address or "local",
                include_dashboard=False if local else None,
                logging_level=logging.ERROR,
                object_store_memory=80 * 2**20 if local else None,
                # A local cluster's processes inherit this one's environment.
                runtime_env=None if local else {"env_vars": self._environment},
            )
        except (ConnectionError, TimeoutError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise PdServeError(f"no Ray cluster at {self._address or 'this machine'}: {lines[0]}") from error

    @staticmethod
    def node_address() -> str:
        """This machine's address as the other machines of the cluster know it."""
        return str(ray.util.get_node_ip_address())

    def launch(self, name: str, num_gpus: float) -> None:
        """Starts an instance's process, which begins to import what it needs."""
        actor_class = ray.remote(num_cpus=0, num_gpus=num_gpus, max_concurrency=1000)(InstanceActor)
        actor = self._actors[name] = actor_class.remote(name)
        actor.load.remote()

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Gives a launched instance its model and waits until it is ready.

        Raises:
            EngineDeadError: It did not come up; the message says why.
        """
        name = config.instance_id
        actor = self._actors[name]
        try:
            info: InstanceInfo = await actor.start.remote(config)
        except ray.exceptions.RayTaskError as error:
            self._discard(name)
            raise EngineDeadError(f"{name} does not start: {error.cause}") from error
        except ray.exceptions.RayError as error:
            self._discard(name)
            raise EngineDeadError(f"{name}: its process ended while starting: {error}") from error
        except asyncio.CancelledError:
            self._discard(name)
            raise
        self._pids[name] = info.pid
        self._watchers.start(self._watch(name, actor))
        return info

    async def stop_instance(self, name: str) -> None:
        """Stops one instance that nobody needs any more, by force if it does not end by itself."""
        actor = self._actors.pop(name, None)
        if actor is None:
            return
        await asyncio.wait([asyncio.ensure_future(_settled(actor.stop.remote()))], timeout=STOP_S)
        ray.kill(actor)

    def _discard(self, name: str) -> None:
        """Ends an instance that is not up, and what it may hold already."""
        if (actor := self._actors.pop(name, None)) is not None and ray.is_initialized():
            ray.kill(actor)

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        """Starts the scheduler's process. Returns its address and process id. Raises: EngineDeadError."""
        actor = self._scheduler = ray.remote(num_cpus=0, max_concurrency=10)(SchedulerActor).remote()
        try:
            address, pid = await actor.start.remote(config)
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            raise EngineDeadError(f"the scheduler does not start: {error}") from error
        self._pids[SCHEDULER] = pid
        return address, pid

    async def scheduler_ended(self) -> None:
        """Returns when the process of the scheduler that was started last is dead."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._scheduler.wait.remote()

    async def stop(self) -> None:
        """Stops all instances, by force after a while, and a local Ray with them."""
        await self._watchers.cancel()
        if ray.is_initialized():
            await self._stop_instances()
            await asyncio.to_thread(ray.shutdown)
        await asyncio.to_thread(_end_children)

    async def _stop_instances(self) -> None:
        actors = [*self._actors.values(), *([self._scheduler] if self._scheduler is not None else [])]
        stops = [asyncio.ensure_future(_settled(actor.stop.remote())) for actor in actors]
        if stops:
            await asyncio.wait(stops, timeout=STOP_S)
        for actor in actors:
            ray.kill(actor)
        self._actors.clear()
        if self._address is None:
            # The raylet reaps its workers; ended before that, it would leave them as zombies.
            deadline = asyncio.get_running_loop().time() + STOP_S
            while any(map(psutil.pid_exists, self._pids.values())):
                await asyncio.sleep(0.02)
                if asyncio.get_running_loop().time() > deadline:
                    break

    async def _watch(self, instance_id: str, actor: Any) -> None:
        try:
            await actor.wait.remote()
        except ray.exceptions.RayError:
            self._pids.pop(instance_id, None)
            if self._actors.pop(instance_id, None) is not None:  # else it was stopped
                self._on_lost(instance_id)


def _own_address(host: str) -> str:
    """Where an actor's sockets are: on loopback as the service is, or on the machine that Ray has chosen."""
    return host if is_local(host) else str(ray.util.get_node_ip_address())


def _end_children() -> None:
    """Ends what Ray left behind, as when it was interrupted while starting. All of it is our own."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=STOP_S)


async def _settled(reference: Any) -> None:
    try:
        await reference
    except ray.exceptions.RayError as error:
        logger.debug("an instance did not stop by itself: %s", error)
