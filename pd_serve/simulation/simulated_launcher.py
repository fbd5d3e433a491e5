"""The launcher of simulations: runs instances and the scheduler in virtual time."""

import asyncio
from collections.abc import Callable
from functools import partial

from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig, SchedulerProcess
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.simulated_instance import SimulatedInstance
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire


class SimulatedLauncher:
    """Implements `pd_serve.manager.launcher.Launcher`; see there.

    Attributes:
        instances: Running instances, by id.
        instance_s: Sum of the lifetimes of the ended instances.
        preemptions, preemption_loss_s, steps: Sums over the ended instances.
        failures: Unexpected failures.
    """

    def __init__(self, config: SimulationConfig, network: SimulatedNetwork) -> None:
        self.on_lost: Callable[[str], None] = lambda instance_id: None
        self.instances: dict[str, SimulatedInstance] = {}
        self.instance_s = 0.0
        self.preemptions = 0
        self.preemption_loss_s = 0.0
        self.steps = 0
        self.failures: list[str] = []
        self._config = config
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._first = {f"{role}-{n}" for role, count in config.instances.items() for n in range(count)}
        self._notes: ManagerNotes | None = None
        self._scheduler: SchedulerProcess | None = None
        self._scheduler_ended = asyncio.Event()

    # ---- Launcher

    async def launch(self, name: str, placement: Placement) -> None:
        """Does nothing: a simulated process needs no time before `start`."""

    def waits_for(self, name: str) -> str:
        return ""

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """The first instances are ready at once, later ones after `start_instance_s`."""
        name, began = config.instance_id, self._loop.time()
        if name not in self._first:
            await asyncio.sleep(self._config.start_instance_s)
        instance = SimulatedInstance(
            name,
            config.role,
            self._config,
            SimulatedWire(name, self._network),
            self._network.fabric,
            began,
            itl_target_s=config.itl_target_s,
            delivery_s=partial(self._network.delay_s, name),
        )
        if not self.instances:
            self._notes = None  # the instances have the notes
        self.instances[name] = instance
        return instance.info

    def leave_starts(self) -> None:
        """A cancelled start has not begun anything here."""

    async def stop_instance(self, name: str) -> None:
        if (instance := self.instances.pop(name, None)) is not None:
            self._account(instance)
            await instance.stop()

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        await self.kill_scheduler()
        return [instance.info for instance in self.instances.values()], self._notes

    async def keep_notes(self, notes: ManagerNotes) -> int:
        if self._notes is None or notes.age > self._notes.age:
            self._notes = notes
        return self._notes.term

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        self._scheduler_ended.clear()
        self._scheduler = SchedulerProcess(
            SimulatedWire(SCHEDULER, self._network),
            config.policies,
            autoscale=config.autoscale or None,
            seed=self._config.seed,
            on_failure=lambda error: self.failures.append(f"scheduler: {error!r}"),
        )
        return self._scheduler.address, 0

    async def stop_scheduler(self) -> None:
        await self.kill_scheduler()

    async def scheduler_ended(self) -> None:
        await self._scheduler_ended.wait()

    # ---- faults, stop and checks

    async def kill_instance(self, name: str) -> None:
        """Ends an instance as if its process had died."""
        self._network.cut(name)
        await self.stop_instance(name)
        self.on_lost(name)

    async def kill_scheduler(self) -> None:
        """Ends the scheduler as if its process had died."""
        if (scheduler := self._scheduler) is not None:
            self._scheduler = None
            await scheduler.close()
            self._network.silence(scheduler.address)
            self._scheduler_ended.set()

    async def stop(self) -> None:
        await self.kill_scheduler()
        for name in list(self.instances):
            await self.stop_instance(name)

    @property
    def num_leaked_blocks(self) -> int:
        """Number of KV blocks that are not free; 0 after the last request."""
        pools = [instance.engine.batcher.pool for instance in self.instances.values()]
        return sum(pool.num_blocks - pool.num_free for pool in pools)

    def problems(self) -> list[str]:
        failed = [instance for instance in self.instances.values() if instance.failure]
        return self.failures + [f"{instance.name} failed: {instance.failure!r}" for instance in failed]

    def _account(self, instance: SimulatedInstance) -> None:
        self.instance_s += self._loop.time() - instance.started_at
        batcher = instance.engine.batcher
        self.preemptions += batcher.preemptions
        self.preemption_loss_s += batcher.preemption_loss_s
        self.steps += instance.engine.steps
