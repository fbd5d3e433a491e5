"""Ray actors of a service: one for each instance, and one for the scheduler."""

import asyncio
import logging
import os
from dataclasses import replace

import ray

from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.comm.wire import Wire, is_local
from pd_serve.instance.instance_process import Instance, InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.observe.logs import configure_logging
from pd_serve.scheduler.scheduler_process import SchedulerConfig, SchedulerProcess

logger = logging.getLogger(__name__)


class InstanceActor:
    """An instance: an async actor in a process of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        configure_logging(name)
        self._instance = Instance()
        self._started: asyncio.Task[InstanceInfo] | None = None
        self._notes: ManagerNotes | None = None

    def __repr__(self) -> str:
        return self._name  # Ray's prefix of every log line

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        config = replace(config, host=own_address(config.host))
        self._started = asyncio.ensure_future(self._instance.start(config))
        return await self._started

    async def found(self) -> tuple[InstanceInfo | None, ManagerNotes | None]:
        """For the next manager: the instance (None if never started) when it is ready, and its notes."""
        return (await self._started if self._started is not None else None), self._notes

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """Keeps the notes if they are the latest. Returns the term of the latest notes."""
        if self._notes is None or notes.age > self._notes.age:
            self._notes = notes
        return self._notes.term

    async def wait(self) -> None:
        """Returns when the instance is stopped; Ray raises an error if its process dies."""
        await self._instance.wait()

    async def stop(self) -> None:
        await self._instance.stop()


class SchedulerActor:
    """The scheduler, in a process of its own. Without vLLM and torch it is ready in about a second."""

    def __init__(self) -> None:
        configure_logging(SCHEDULER)
        self._stopped = asyncio.Event()

    def __repr__(self) -> str:
        return SCHEDULER

    async def start(self, config: SchedulerConfig) -> tuple[str, int]:
        """Starts the scheduler. Returns its address and its process id."""
        self._wire = Wire(SCHEDULER, own_address(config.host), config.keys)
        self._scheduler = SchedulerProcess(
            self._wire,
            config.policies,
            autoscale=config.autoscale or None,
            on_failure=self._die,
        )
        return self._scheduler.address, os.getpid()

    async def wait(self) -> None:
        """Returns when the scheduler is stopped; Ray raises an error if its process dies."""
        await self._stopped.wait()

    async def stop(self) -> None:
        await self._scheduler.close()
        await self._wire.close()
        self._stopped.set()

    def _die(self, error: BaseException) -> None:
        logger.critical("the scheduler ends itself: %s", error, exc_info=error)
        os._exit(1)


def own_address(host: str) -> str:
    """Address of an actor's sockets: loopback if `host` is, otherwise the address of the actor's machine."""
    return host if is_local(host) else str(ray.util.get_node_ip_address())
