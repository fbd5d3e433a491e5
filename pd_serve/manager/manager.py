"""The owner of the instances and the scheduler: starts them, keeps as many as are asked for, ends them.

It is no part of any request's way: API servers go on while it is away, and the next one finds what it left.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import InstanceInfo, SchedulerReport, StartInstance, StopInstance
from pd_serve.comm.roster import InstanceRegistry
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.errors import EngineDeadError
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.instance_pool import InstancePool
from pd_serve.manager.manager_link import MANAGER, ManagerDesk
from pd_serve.platform.memory import check_memory
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig
from pd_serve.simulated_engine.settings import EngineSettings
from router.scaling import PoolBounds
from router.settings import PolicySet

logger = logging.getLogger(__name__)

#: A scheduler that dies sooner would die again at once: the next one waits a little.
SCHEDULER_LIFE_S = 10.0


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """What instances and the scheduler are started with. Plain values: it travels through Ray.

    Attributes:
        instances: How many at the start, by role.
        max_instances: The scheduler gets never more than so many.
        engine_args: Arguments of vLLM's `AsyncEngineArgs`, by role.
        placements: What instances ask of their machine, by role.
        host: Address that sockets bind to; if it leaves the machine, each binds to its own machine's.
        checks_memory: All of them share this machine: a start is refused if its memory does not suffice.
    """

    model: str
    instances: dict[str, int]
    autoscale: dict[str, PoolBounds]
    max_instances: int
    policies: PolicySet
    engine_args: dict[str, dict[str, Any]]
    placements: dict[str, Placement]
    host: str
    keys: CurveKeys
    environment: dict[str, str] = field(default_factory=dict)
    stage_bytes_per_s: float | None = None
    simulated: EngineSettings | None = None
    replaces: bool = True
    checks_memory: bool = False


class Cluster(Protocol):
    """What starts and ends processes; see `pd_serve.manager.ray_launcher.RayCluster`."""

    on_lost: Callable[[str], None]

    def launch(self, name: str, placement: Placement) -> None: ...
    def waits_for(self, name: str) -> str: ...
    def start(self, config: InstanceConfig) -> Awaitable[InstanceInfo]: ...
    def stop_instance(self, name: str) -> Awaitable[None]: ...
    def find(self) -> Awaitable[tuple[list[InstanceInfo], Any]]: ...
    def note(self, notes: Any) -> None: ...
    def start_scheduler(self, config: SchedulerConfig) -> Awaitable[tuple[str, int]]: ...
    def scheduler_ended(self) -> Awaitable[None]: ...


class Notice(Protocol):
    """Where a person looks."""

    def step(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Manager:
    """Lives on one event loop, until `close`. The processes are the cluster's, and end with that.

    Attributes:
        address: Where API servers reach it.
    """

    def __init__(self, config: ManagerConfig, cluster: Cluster, notice: Notice) -> None:
        self._config = config
        self._cluster = cluster
        self._notice = notice
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._wire = Wire(MANAGER, config.host, config.keys)
        self._desk = ManagerDesk(self._wire)
        self.address = self._desk.address
        self._roster = InstanceRegistry(
            MANAGER,
            self._wire,
            is_claimed=self._desk.is_claimed,
            on_scaling=self._on_scaling,
            on_decided=self._on_decided,
            on_silent=self._on_silent,
        )
        self._fleet = InstancePool(
            self._roster,
            self._start_instance,
            cluster.stop_instance,
            max_instances=config.max_instances,
            instances=config.instances,
            autoscale=config.autoscale,
            policy=config.policies.name,
            replaces=config.replaces,
            waits_for=cluster.waits_for,
            on_change=self._changed,
        )
        self._noted: dict[str, Any] = {}
        self._version = 0
        cluster.on_lost = self._on_lost

    async def start(self, names: list[tuple[str, str]]) -> None:
        """Starts the instances, by id and role. Raises: PdServeError: one does not start."""
        await self._fleet.fill(names)
        self._serve(took_over=False)

    async def take_over(self) -> bool:
        """Goes on with the instances that the last owner has left. False: there are none."""
        infos, notes = await self._cluster.find()
        if not infos:
            return False
        notes = notes or self._fleet.notes()
        self._version = notes.get("version", 0)
        self._fleet.take_over(infos, notes)
        self._notice.step(f"took over {', '.join(info.instance_id for info in infos)}")
        self._serve(took_over=True)
        return True

    def _serve(self, *, took_over: bool) -> None:
        self._desk.open(self._roster, self._fleet, took_over=took_over)
        self._tasks.start(self._keep_scheduler())
        self._changed()

    async def close(self) -> None:
        await self._tasks.cancel()
        await self._fleet.close()
        await self._desk.close()
        await self._roster.close()
        await self._wire.close()

    async def _start_instance(self, name: str, role: str) -> InstanceInfo:
        config = self._config
        if config.checks_memory and name not in config_names(config):
            check_memory(1, config.engine_args[role], config.model)
        self._cluster.launch(name, config.placements[role])
        instance = InstanceConfig(
            name,
            role,
            config.engine_args[role],
            config.host,
            config.keys,
            config.environment,
            config.stage_bytes_per_s,
            config.simulated,
        )
        info = await self._cluster.start(instance)
        self._notice.step(f"{name} is ready (pid {info.pid})")
        if info.no_migration is not None:
            self._notice.warn(f"{name} SERVES WITHOUT MIGRATION: {info.no_migration}")
        return info

    async def _keep_scheduler(self) -> None:
        """Always one scheduler: the next as soon as one has died, unless they die at once."""
        config = self._config
        scheduler = SchedulerConfig(config.policies, config.autoscale, config.host, config.keys)
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            began = self._loop.time()
            try:
                address, pid = await self._cluster.start_scheduler(scheduler)
                self._desk.scheduler_at(address)
                self._fleet.scheduler_started(address, pid)
                await self._cluster.scheduler_ended()
                self._notice.warn("the scheduler has died and is started again; requests go on")
            except EngineDeadError as error:
                self._notice.warn(f"{error}; nothing is moved or scaled")
            self._fleet.scheduler_lost()
            pause_s = 0.0 if self._loop.time() - began > SCHEDULER_LIFE_S else min(pause_s + 1.0, 10.0)

    # ---- what happens

    def _on_scaling(self, wanted: StartInstance | StopInstance) -> None:
        self._fleet.on_scaling(wanted)

    def _on_decided(self, report: SchedulerReport) -> None:
        self._fleet.on_decided(report)

    def _on_lost(self, instance_id: str) -> None:
        self._notice.warn(f"{instance_id} has died; its requests are recomputed elsewhere")
        self._fleet.lost(instance_id)

    def _on_silent(self, instance_id: str) -> None:
        """Its process may hang: nothing of it is to come to life again."""
        self._notice.warn(f"{instance_id} hangs and is ended; its requests are recomputed elsewhere")
        self._fleet.lost(instance_id)
        self._tasks.start(self._end(instance_id))

    async def _end(self, instance_id: str) -> None:
        await self._cluster.stop_instance(instance_id)

    def _changed(self) -> None:
        """API servers are told; the instances keep what the next owner would not see."""
        self._desk.changed()
        notes = self._fleet.notes()
        state = {"notes": notes, "kept_by": [info.instance_id for info in self._roster.instances]}
        if state != self._noted:
            self._noted = state
            self._version += 1
            self._cluster.note(notes | {"version": self._version})


def config_names(config: ManagerConfig) -> set[str]:
    """Ids of the instances at the start."""
    return {f"{role}-{number}" for role, count in config.instances.items() for number in range(count)}
