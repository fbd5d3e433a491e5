"""The platform under a cluster with faults, in the place of Ray: processes that outlive their manager.

It does what `pd_serve.manager.ray_launcher` relies on: named actors for instances and scheduler, which keep
the notes of the managers, and which each manager's launcher watches.
"""

import asyncio
import random
from collections.abc import Callable

from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.comm.timing import INSTANCE_LEASE_S, ORPHAN_S, START_TIMEOUT_S
from pd_serve.errors import EngineDeadError
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.launcher import ManagerNotes, answered
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig, SchedulerProcess
from pd_serve.simulated_engine.faults import EngineFaults, PoisonError
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.faults.actors import SimulatedActor, StartFaults
from pd_serve.simulation.faults.links import FaultyNetwork, FaultyWire
from pd_serve.simulation.faults.process_loop import ProcessLoop, SimulatedProcess
from pd_serve.simulation.simulated_instance import SimulatedInstance

#: How long a call to an actor that does not answer is waited for; as in `ray_launcher`.
ANSWER_S = 3.0

#: Interval of looks whether an instance is ready.
LOOK_S = 1.0

#: Greatest time until a launcher learns of a death.
NOTICE_S = 0.5


class SimulatedPlatform:
    """Runs instances and the scheduler, each in a process of its own.

    Attributes:
        actors: Living instances by name.
        scheduler: The process of the scheduler; None if there is none.
        starts: Faults of the next starts.
        names: Names of all instances that there were.
        bare_s: The longest time without an instance that is ready and no operator drains.
        poison: Numbers of the requests that kill each instance that computes them.
        on_stop: Called with (name, instance) when a manager stops an instance that is ready.
        on_failure: Called with (name, error) when a process ends itself because of a failure.
        on_death: Called with the name of every instance that was killed or has ended itself.
    """

    def __init__(
        self, loop: ProcessLoop, rng: random.Random, network: FaultyNetwork, config: SimulationConfig
    ) -> None:
        self.actors: dict[str, SimulatedActor] = {}
        self.scheduler: tuple[SimulatedProcess, SchedulerProcess, FaultyWire] | None = None
        self.starts = StartFaults()
        self.bare_s = 0.0
        self.poison: set[int] = set()
        self.names: set[str] = set()
        self.on_stop: Callable[[str, SimulatedActor], None] = lambda name, actor: None
        self.on_failure: Callable[[str, BaseException], None] = lambda name, error: None
        self.on_death: Callable[[str], None] = lambda name: None
        self.loop = loop
        self.network = network
        self._rng = rng
        self._config = config
        self._launchers: list[PlatformLauncher] = []
        self._scheduler_ended: asyncio.Future[None] | None = None
        self._resources = asyncio.Event()
        self._bare_since = loop.now
        self._look()

    def launcher(self, process: SimulatedProcess) -> "PlatformLauncher":
        """The launcher of a manager that runs in this process."""
        launcher = PlatformLauncher(self, process)
        self._launchers.append(launcher)
        return launcher

    @property
    def instances(self) -> dict[str, SimulatedInstance]:
        """The instances that are ready, by name."""
        return {name: actor.instance for name, actor in self.actors.items() if actor.instance is not None}

    def _look(self) -> None:
        if all(instance.llumlet.reporter.drained_by_operator for instance in self.instances.values()):
            self.bare_s = max(self.bare_s, self.loop.now - self._bare_since)
        else:
            self._bare_since = self.loop.now
        self.loop.outside_at(self.loop.now + LOOK_S, self._look)

    # ---- faults

    def kill_instance(self, name: str) -> None:
        """Ends an instance as SIGKILL does."""
        if (actor := self.actors.get(name)) is not None:
            self._end(actor)
            self.on_death(name)

    def kill_scheduler(self) -> None:
        """Ends the scheduler as SIGKILL does."""
        if self.scheduler is not None and self._scheduler_ended is not None:
            self.scheduler[0].kill()
            self.scheduler = None
            self._scheduler_ended.set_result(None)

    def starve(self, starved: bool) -> None:
        """Takes the resources for further instances away, or gives them back."""
        self.starts.starved = starved
        resources, self._resources = self._resources, asyncio.Event()
        resources.set()

    # ---- for launchers

    def launch(self, name: str) -> SimulatedActor:
        if name not in self.actors:
            self.network.fabric.restore(name)
            self.names.add(name)
            self.actors[name] = SimulatedActor(name, self.loop.spawn(name), EngineFaults(poison=self.poison))
        return self.actors[name]

    async def wait_for_resources(self) -> None:
        while self.starts.starved:
            await self._resources.wait()

    async def start(self, actor: SimulatedActor, config: InstanceConfig) -> InstanceInfo:
        """Serves an order to start the instance of a launched process. Idempotent."""
        is_lost = self.starts.lost_starts > 0
        self.starts.lost_starts -= is_lost
        if is_lost and self._rng.random() < 0.5:
            await self.loop.create_future()  # the order itself is lost
        if actor.started is None:
            self._begin_start(actor, config)
        assert actor.started is not None
        info = await asyncio.shield(actor.started)
        if is_lost:
            await self.loop.create_future()
        return info

    def _begin_start(self, actor: SimulatedActor, config: InstanceConfig) -> None:
        starts = self.starts
        duration_s = self._config.start_instance_s * self._rng.uniform(0.5, 1.5) + starts.delay_s
        fails = starts.failures > 0
        starts.failures -= fails
        actor.started = self.loop.create_future()
        if duration_s > START_TIMEOUT_S - 60.0:
            starts.ended_at = self.loop.now + START_TIMEOUT_S
        self.loop.outside_at(self.loop.now + duration_s, self._ready, actor, config, fails)

    def _ready(self, actor: SimulatedActor, config: InstanceConfig, fails: bool) -> None:
        assert actor.started is not None
        if self.actors.get(actor.name) is not actor or actor.started.done():
            return
        if fails:
            self.starts.ended_at = self.loop.now
            actor.started.set_exception(EngineDeadError(f"{actor.name} does not start: injected"))
            actor.started.exception()
            self.loop.outside_at(self.loop.now + ORPHAN_S, self._end_unused, actor)
            return
        actor.process.call_soon(self._construct, actor, config)

    def _end_unused(self, actor: SimulatedActor) -> None:
        """The process of a failed start ends itself, if its manager has not ended it."""
        if self.actors.get(actor.name) is actor:
            self._end(actor)

    def _construct(self, actor: SimulatedActor, config: InstanceConfig) -> None:
        name = actor.name
        actor.instance = SimulatedInstance(
            name,
            config.role,
            self._config,
            FaultyWire(name, self.network),
            self.network.fabric,
            self.loop.now,
            lambda error: self._failed(name, error),
            actor.faults,
        )
        assert actor.started is not None
        actor.started.set_result(actor.instance.info)
        if self.starts.early_deaths:
            self.starts.early_deaths -= 1
            self.starts.ended_at = self.loop.now + self.starts.dies_after_s
            self.loop.outside_at(self.starts.ended_at, self.kill_instance, name)

    def _failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, PoisonError):
            self.on_failure(name, error)
        self.kill_instance(name)

    def stop(self, name: str) -> None:
        """Ends an instance for a manager."""
        if (actor := self.actors.get(name)) is not None:
            if actor.instance is not None:
                self.on_stop(name, actor)
            self._end(actor)

    def _end(self, actor: SimulatedActor) -> None:
        del self.actors[actor.name]
        actor.process.kill()
        for launcher in self._launchers:
            if actor.name in launcher.watched:
                at = self.loop.now + self._rng.uniform(0.001, NOTICE_S)
                self.loop.outside_at(at, launcher.process.call_soon, launcher.lost, actor.name)
        self.network.fabric.die(actor.name)
        if actor.started is not None and not actor.started.done():
            actor.started.set_exception(EngineDeadError(f"{actor.name}: its process ended while starting"))
            actor.started.exception()

    def start_scheduler(self, config: SchedulerConfig) -> tuple[str, SimulatedProcess]:
        if self.scheduler is not None:
            self.kill_scheduler()
            raise EngineDeadError("the scheduler does not start: its name was taken")
        process = self.loop.spawn(SCHEDULER)
        self._scheduler_ended = self.loop.create_future()

        def construct() -> str:
            wire = FaultyWire(SCHEDULER, self.network)
            scheduler = SchedulerProcess(
                wire,
                config.policies,
                autoscale=config.autoscale or None,
                seed=self._config.seed,
                on_failure=self._scheduler_failed,
            )
            self.scheduler = (process, scheduler, wire)
            return scheduler.address

        return process.run(construct), process

    def _scheduler_failed(self, error: BaseException) -> None:
        self.on_failure(SCHEDULER, error)
        self.kill_scheduler()

    async def scheduler_ended(self) -> None:
        if self._scheduler_ended is not None:
            await asyncio.shield(self._scheduler_ended)


class PlatformLauncher:
    """Implements `pd_serve.manager.launcher.Launcher` for one manager; see there.

    Attributes:
        watched: The instances whose death it reports.
    """

    def __init__(self, platform: SimulatedPlatform, process: SimulatedProcess) -> None:
        self.on_lost: Callable[[str], None] = lambda instance_id: None
        self.process = process
        self.watched: set[str] = set()
        self._platform = platform
        self._waiting: set[str] = set()
        self._launched: set[str] = set()
        self._leaves_starts = False
        self._scheduler: SimulatedProcess | None = None

    def lost(self, name: str) -> None:
        if name in self.watched:
            self.watched.discard(name)
            self.on_lost(name)

    async def launch(self, name: str, placement: Placement) -> None:
        if name in self._platform.actors and name not in self._launched:
            raise EngineDeadError(f"{name} does not start: its name is taken")
        self._launched.add(name)
        self._platform.launch(name)

    def waits_for(self, name: str) -> str:
        return "waiting for resources" if name in self._waiting else ""

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        name = config.instance_id
        actor = self._platform.launch(name)
        try:
            if self._platform.starts.starved:
                self._waiting.add(name)
                await self._platform.wait_for_resources()
            info = await answered(lambda: self._platform.start(actor, config))
        except (EngineDeadError, asyncio.CancelledError) as error:
            if isinstance(error, EngineDeadError) or not self._leaves_starts:
                self._platform.stop(name)
            raise
        finally:
            self._waiting.discard(name)
        self.watched.add(name)
        return info

    def leave_starts(self) -> None:
        self._leaves_starts = True

    async def stop_instance(self, name: str) -> None:
        self.watched.discard(name)
        if (starts := self._platform.starts).lost_stops and name not in starts.hanging:
            starts.lost_stops -= 1
            starts.survivors.add(name)
        elif name in self._platform.actors:
            await asyncio.sleep(0.01)
            self._platform.stop(name)

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        platform = self._platform
        platform.kill_scheduler()
        infos, notes = [], []
        actors = list(platform.actors.values())
        await self._answers(actors, INSTANCE_LEASE_S, started=True)
        for actor in actors:
            if platform.actors.get(actor.name) is not actor:
                continue
            if actor.instance is None or not actor.process.is_running:
                platform.stop(actor.name)
                continue
            self.watched.add(actor.name)
            infos.append(actor.instance.info)
            notes += [actor.notes] if actor.notes is not None else []
        return infos, max(notes, key=lambda found: found.age, default=None)

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """A suspended actor keeps them when it goes on, whether or not this manager still lives."""
        actors = list(self._platform.actors.values())
        for actor in actors:
            actor.process.call_soon(actor.keep, notes)
        await self._answers(actors, ANSWER_S)
        return max((a.notes.term for a in actors if a.process.is_running and a.notes), default=0)

    async def _answers(
        self, actors: list[SimulatedActor], timeout_s: float, *, started: bool = False
    ) -> None:
        """Waits until all actors that live can answer, and are no longer starting, at most for a time."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.002)
        deadline = loop.time() + timeout_s
        while loop.time() < deadline and any(  # noqa: ASYNC110
            actor.process.is_suspended or (started and actor.is_starting) for actor in actors
        ):
            await asyncio.sleep(0.1)

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        await asyncio.sleep(0.2)
        address, self._scheduler = self._platform.start_scheduler(config)
        return address, 0

    async def stop_scheduler(self) -> None:
        if self._scheduler is not None and self._scheduler.is_alive:
            self._platform.kill_scheduler()

    async def scheduler_ended(self) -> None:
        await self._platform.scheduler_ended()
