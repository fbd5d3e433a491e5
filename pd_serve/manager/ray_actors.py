"""Ray actors of a service: those of the instances, and one for the scheduler."""

import asyncio
import logging
import os
import threading
from dataclasses import replace

import ray

from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.comm.timing import INSTANCE_LEASE_S, ORPHAN_S, START_TIMEOUT_S
from pd_serve.comm.wire import Wire, is_local
from pd_serve.instance.instance_process import Instance, InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.observe.logs import INSTANCE, configure_logging
from pd_serve.platform.open_files import allow_many_open_files
from pd_serve.scheduler.scheduler_process import SchedulerConfig, SchedulerProcess

logger = logging.getLogger(__name__)

#: Time that instances have to get ready when the next manager looks for them, in seconds. The manager waits
#: for the time of a lease.
READY_S = 0.8 * INSTANCE_LEASE_S


class InstanceActor:
    """The process of one instance, or of several simulated ones: an async actor.

    Its manager ends it if a start fails. If that one is gone, it ends itself: two minutes after a start that
    has failed or takes longer than any may, and when no start has been ordered for that long.

    Args:
        name: Name of the process.
        places: Number of instances that it runs in its life.
    """

    def __init__(self, name: str, places: int = 1) -> None:
        self._name = name
        self._is_shared = places > 1
        configure_logging(name)
        allow_many_open_files()
        self._instances: dict[str, Instance] = {}  # ended ones, too: see `Instance`
        self._starts: dict[str, asyncio.Task[InstanceInfo]] = {}
        self._notes: ManagerNotes | None = None
        # A thread's timer: there is no event loop yet, and there may never be a call.
        self._unused = threading.Timer(START_TIMEOUT_S, self._end_if_unused)
        self._unused.daemon = True
        self._unused.start()

    def __repr__(self) -> str:
        return self._name  # Ray's prefix of every log line

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Starts an instance. Idempotent: each order is answered when it is ready."""
        self._unused.cancel()
        if (start := self._starts.get(config.instance_id)) is None:
            config = replace(config, host=own_address(config.host))
            start = self._starts[config.instance_id] = asyncio.ensure_future(self._start(config))
        return await start

    async def _start(self, config: InstanceConfig) -> InstanceInfo:
        if self._is_shared:
            INSTANCE.set(config.instance_id)
        instance = self._instances[config.instance_id] = Instance(self._has_others)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await instance.start(config)
        except Exception:
            asyncio.get_running_loop().call_later(ORPHAN_S, self._end_if_unused)
            raise

    def _has_others(self, ending: Instance) -> bool:
        return any(one is not ending and not one.has_ended for one in self._instances.values())

    def _end_if_unused(self) -> None:
        """Ends the process if none of its instances serves, or is being started."""
        if not any(self._is_used(instance_id) for instance_id in self._starts):
            logger.error("%s ends: no manager uses it", self._name)
            os._exit(1)

    def _is_used(self, instance_id: str) -> bool:
        start = self._starts[instance_id]
        if not start.done():
            return True
        return not (start.cancelled() or start.exception() or self._instances[instance_id].has_ended)

    async def found(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        """For the next manager: the ready instances, and its notes. Ends those that do not get ready."""
        if self._starts:
            await asyncio.wait(self._starts.values(), timeout=READY_S)
        infos = []
        for instance_id, start in self._starts.items():
            if not start.done():
                await self.stop_one(instance_id)
            elif self._is_used(instance_id):
                infos.append(start.result())
        return infos, self._notes

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """Keeps the notes if they are the latest. Returns the term of the latest notes."""
        if self._notes is None or notes.age > self._notes.age:
            self._notes = notes
        return self._notes.term

    async def wait(self, instance_id: str) -> None:
        """Returns when an instance is stopped. Ray raises an error if it fails, or its process dies."""
        await self._instances[instance_id].wait()

    async def stop_one(self, instance_id: str) -> None:
        """Stops an instance, or its start. Unknown ones are ignored."""
        if (instance := self._instances.get(instance_id)) is not None:
            start = self._starts[instance_id]
            start.cancel()
            await asyncio.wait([start])
            await instance.stop()

    async def stop(self) -> None:
        """Stops all instances."""
        await asyncio.gather(*map(self.stop_one, self._instances))


class SchedulerActor:
    """The scheduler, in a process of its own. Without vLLM and torch it is ready in about a second."""

    def __init__(self) -> None:
        configure_logging(SCHEDULER)
        allow_many_open_files()
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
