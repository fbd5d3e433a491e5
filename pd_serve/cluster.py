"""Starting, watching and stopping instances on Ray. The only place of the service that knows Ray."""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import ray

from migration.errors import EngineDeadError, PdServeError
from migration.tasks import OwnedTasks
from pd_serve.instance import Instance, InstanceConfig, InstanceInfo

logger = logging.getLogger(__name__)

STOP_S = 3.0


class InstanceActor:
    """Ray's view of an instance: an async actor, one process."""

    def __init__(self, config: InstanceConfig) -> None:
        _quiet_logging()
        self._instance = Instance(config)

    async def start(self) -> InstanceInfo:
        return await self._instance.start()

    async def wait(self) -> None:
        """Returns when the instance was stopped; fails at once when its process dies."""
        await self._instance.wait()

    async def stop(self) -> None:
        await self._instance.stop()


class RayCluster:
    """The instances of one service.

    Args:
        address: An existing cluster's address; None starts a local one that ends with this process.
        on_lost: Called with the id of an instance whose process has died.
    """

    def __init__(self, address: str | None, on_lost: Callable[[str], None]) -> None:
        self._address = address
        self._on_lost = on_lost
        self._actors: dict[str, Any] = {}
        self._watchers = OwnedTasks()

    def connect(self) -> None:
        """Starts or joins Ray. Blocks for seconds. Raises: PdServeError: no cluster at that address."""
        if self._address is None:
            # Nothing of Ray's own is looked at on a local cluster: leave out what costs start-up time.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            os.environ.setdefault("RAY_enable_worker_prestart", "0")
        try:
            ray.init(
                address=self._address or "local",
                include_dashboard=False if self._address is None else None,
                log_to_driver=True,
                logging_level=logging.WARNING,
                object_store_memory=None if self._address else 80 * 2**20,
            )
        except ConnectionError as error:
            raise PdServeError(f"no Ray cluster at {self._address}: {error}") from error

    @staticmethod
    def node_address() -> str:
        """This machine's address as the other machines of the cluster know it."""
        return str(ray.util.get_node_ip_address())

    async def start(self, config: InstanceConfig, num_gpus: float) -> InstanceInfo:
        """Starts one instance and waits until it is ready.

        Raises:
            EngineDeadError: It did not come up; the message says why.
        """
        actor_class = ray.remote(num_cpus=0, num_gpus=num_gpus, max_concurrency=1000)(InstanceActor)
        actor = actor_class.options(runtime_env={"env_vars": config.environment}).remote(config)
        self._actors[config.instance_id] = actor
        try:
            info: InstanceInfo = await actor.start.remote()
        except ray.exceptions.RayTaskError as error:
            raise EngineDeadError(f"{config.instance_id}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise EngineDeadError(
                f"{config.instance_id}: its process ended while starting: {error}"
            ) from error
        self._watchers.start(self._watch(config.instance_id, actor))
        return info

    async def _watch(self, instance_id: str, actor: Any) -> None:
        try:
            await actor.wait.remote()
        except ray.exceptions.RayError:
            logger.error("%s has died", instance_id)
            self._actors.pop(instance_id, None)
            self._on_lost(instance_id)

    async def stop(self) -> None:
        """Stops all instances, by force after a while, and a local Ray with them."""
        await self._watchers.cancel()
        stops = [asyncio.wrap_future(actor.stop.remote().future()) for actor in self._actors.values()]
        if stops:
            await asyncio.wait(stops, timeout=STOP_S)
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        await asyncio.to_thread(ray.shutdown)


def _quiet_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
