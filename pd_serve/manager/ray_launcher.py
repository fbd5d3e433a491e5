"""The launcher of production: runs the processes of a service as Ray actors."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.comm.timing import INSTANCE_LEASE_S
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.instance_processes import InstanceProcess, InstanceProcesses
from pd_serve.manager.launcher import ManagerNotes, answered
from pd_serve.manager.note_keepers import NAMESPACE, NoteKeepers, named_actors
from pd_serve.manager.ray_actors import InstanceActor, SchedulerActor
from pd_serve.manager.ray_calls import in_time, settled
from pd_serve.manager.ray_start import CONNECT_ERRORS, end_children, exit_without_ray, ray_lives, start_ray
from pd_serve.platform.placement import ANYWHERE, Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig

logger = logging.getLogger(__name__)

#: Time for instances to end by themselves before they are killed.
STOP_S = 3.0

#: Time for Ray to end the processes of a service.
END_S = 10.0


class RayLauncher:
    """Implements `pd_serve.manager.launcher.Launcher` for the instances and the scheduler of one service.

    Args:
        address: Address of a running cluster; None starts a local one that ends with this process.
        environment: Environment variables of every instance's process.
        on_lost: Called with the id of an instance whose process has died.
        python: Command that runs the script of an instance's process; None for this Python.
        service: With a name, actors outlive this process, and the next manager with that name finds them.
            This process is connected to Ray already, and Ray continues after it.
        instances_per_process: Instances that share a process; they cannot have requirements on its machine.
    """

    def __init__(
        self,
        address: str | None,
        environment: dict[str, str],
        on_lost: Callable[[str], None] = lambda instance_id: None,
        python: str | None = None,
        service: str | None = None,
        instances_per_process: int = 1,
    ) -> None:
        self._address = address
        self._python = python
        self._environment = environment
        self._service = service
        self._is_local = address is None and service is None
        self.on_lost = on_lost
        self._processes = InstanceProcesses(instances_per_process)
        self._keepers = NoteKeepers(service, self._processes)
        self._groups: dict[str, Any] = {}
        self._waits_for: dict[str, str] = {}
        self._leaves_starts = False
        self._launching = asyncio.Lock()
        self._scheduler: Any = None
        self._workers: dict[str, psutil.Process] = {}  # of a local Ray
        self._watchers = BackgroundTasks()

    def connect(self) -> None:
        """Starts or joins Ray. Blocks for seconds.

        Raises:
            PdServeError: There is no cluster at the address, or a local one does not start.
        """
        if self._service is not None:
            return
        local = self._is_local

        def init() -> None:
            ray.init(
                address=self._address or "local",
                include_dashboard=False if local else None,
                logging_level=logging.ERROR,
                object_store_memory=80 * 2**20 if local else None,
                runtime_env=None if local else {"env_vars": self._environment},  # local ones inherit ours
            )

        try:
            start_ray(init) if local else init()
        except Exception as error:
            if type(error) is not Exception and not isinstance(error, CONNECT_ERRORS):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            what = "Ray does not start" if local else f"no Ray cluster at {self._address}"
            raise PdServeError(f"{what}: {lines[0]}") from error

    @staticmethod
    def node_address() -> str:
        """This machine's address in the cluster."""
        return str(ray.util.get_node_ip_address())

    # ---- instances

    async def launch(self, name: str, placement: Placement) -> None:
        """See `Launcher`."""
        if not await self._keepers.are_ours():
            raise EngineDeadError(f"{name} does not start: another manager has taken over")
        async with self._launching:  # one after the other: the next one may get a place in this process
            if name not in self._processes and not self._processes.place(name):
                process = self._processes.name_of_new(name)
                new, undo = partial(self._new_actor, process, placement), partial(self._end_soon, process)
                actor = await in_time(new, undo)
                self._processes.add(name, process, actor)

    def _new_actor(self, name: str, placement: Placement) -> Any:
        options: dict[str, Any] = {**ANYWHERE, "max_concurrency": 1000, **self._lasting(name)}
        if bundle := placement.bundle():
            group = self._groups[name] = ray.util.placement_group(
                [bundle], strategy="STRICT_PACK", **self._lasting(name, runtime_env=False)
            )
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, 0)
            options["num_gpus"] = placement.num_gpus
            options["resources"] = {name: amount for name, amount in bundle.items() if name != "GPU"}
        if self._python is not None:
            options["runtime_env"] = {**options.get("runtime_env", {}), "py_executable": self._python}
        try:
            return ray.remote(InstanceActor).options(**options).remote(name, self._processes.places)
        except ValueError as error:  # an instance that a former manager was starting has the name
            self._free(name)
            raise EngineDeadError(f"{name} does not start: {error}") from error

    def _lasting(self, name: str, *, runtime_env: bool = True) -> dict[str, Any]:
        """Ray's options for actors that outlive this process."""
        if self._service is None:
            return {}
        lasting: dict[str, Any] = {"name": f"{self._service}:{name}", "lifetime": "detached"}
        if runtime_env:
            lasting |= {"namespace": NAMESPACE, "runtime_env": {"env_vars": self._environment}}
        return lasting

    def waits_for(self, name: str) -> str:
        """See `Launcher`."""
        return self._waits_for.get(name, "")

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """See `Launcher`. The error has the reason."""
        name = config.instance_id
        process = self._processes[name]
        try:
            await self._placed(name)
            info = await answered(lambda: process.actor.start.remote(config))
        except ray.exceptions.RayError as error:
            self._discard(name)
            if isinstance(error, ray.exceptions.RayTaskError):
                raise EngineDeadError(f"{name} does not start: {error.cause}") from error
            raise EngineDeadError(f"{name}: its process ended while starting: {error}") from error
        except asyncio.CancelledError:
            if not self._leaves_starts:
                self._discard(name)
            raise
        finally:
            self._waits_for.pop(name, None)
        self._keep(info, process)
        return info

    def leave_starts(self) -> None:
        """See `Launcher`."""
        self._leaves_starts = True

    async def _placed(self, name: str) -> None:
        """Waits for the instance's resources."""
        group = self._groups.get(name)
        while group is not None and not await asyncio.to_thread(group.wait, 1):
            amounts = ", ".join(f"{amount:g} {what}" for what, amount in group.bundle_specs[0].items())
            self._waits_for[name] = f"waiting for resources: {amounts}"
        self._waits_for.pop(name, None)

    def _keep(self, info: InstanceInfo, process: InstanceProcess) -> None:
        self._know(info.instance_id, info.pid)
        self._watchers.start(self._watch(info.instance_id, process))

    def _know(self, name: str, pid: int) -> None:
        if self._is_local:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._workers[name] = psutil.Process(pid)

    async def stop_instance(self, name: str) -> None:
        """See `Launcher`. A process with others has the time of a lease to answer, and ends otherwise."""
        if not await self._keepers.wait() or (process := self._processes.remove(name)) is None:
            return
        stop = asyncio.ensure_future(settled(process.actor.stop_one.remote(name)))
        await asyncio.wait([stop], timeout=INSTANCE_LEASE_S if process.instances else STOP_S)
        if stop.cancel() or not process.instances:
            await self._end(process.name, process.actor)

    def _discard(self, name: str) -> None:
        """Ends an instance that is not ready, and frees its resources."""
        if (process := self._processes.remove(name)) is not None and ray.is_initialized():
            if process.instances:
                self._watchers.start(settled(process.actor.stop_one.remote(name)))
            else:
                self._end_soon(process.name, process.actor)

    def _end_soon(self, name: str, actor: Any) -> None:
        self._watchers.start(self._end(name, actor))

    async def _end(self, name: str, actor: Any) -> None:
        """Ends a process by force when Ray answers, unless another manager has taken over by then."""

        def end() -> None:
            ray.kill(actor)
            self._free(name)

        if await self._keepers.wait():
            with contextlib.suppress(EngineDeadError):
                await in_time(end)

    def _free(self, name: str) -> None:
        if (group := self._groups.pop(name, None)) is not None:
            ray.util.remove_placement_group(group)

    # ---- taking over

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        """See `Launcher`. Ends instances that were never started, and the scheduler.

        One that waits for resources, or is not ready within the time of a lease, counts as never started.
        """
        infos: list[InstanceInfo] = []
        found_notes: list[ManagerNotes] = []
        self._watchers.start(self._keepers.watch())
        actors = await in_time(partial(named_actors, self._service or ""))
        if (scheduler := actors.pop(SCHEDULER, None)) is not None:
            await self._end(SCHEDULER, scheduler)  # it keeps no state, and the next one is ready in a second
        asked = {name: asyncio.ensure_future(settled(a.found.remote())) for name, a in actors.items()}
        if asked:
            await asyncio.wait(asked.values(), timeout=INSTANCE_LEASE_S)
        for name, actor in actors.items():
            if asked[name].cancel():
                infos_there, notes = [], None
            elif (found := asked[name].result()) is None:
                continue  # it has died
            else:
                infos_there, notes = found
            with contextlib.suppress(ValueError):
                group = f"{self._service}:{name}"
                self._groups[name] = await in_time(partial(ray.util.get_placement_group, group))
            process = self._processes.found(name, actor, [info.instance_id for info in infos_there])
            if not infos_there:
                await self._end(name, actor)
            for info in infos_there:
                self._keep(info, process)
            infos += infos_there
            found_notes += [notes] if infos_there and notes is not None else []
        living = [info for info in infos if info.instance_id in self._processes]  # some have died meanwhile
        return living, max(found_notes, key=lambda notes: notes.age, default=None)

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """See `Launcher`."""
        return await self._keepers.give(notes)

    # ---- the scheduler

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        """See `Launcher`."""
        options = {**ANYWHERE, "max_concurrency": 10, **self._lasting(SCHEDULER)}
        new = ray.remote(SchedulerActor).options(**options).remote
        try:
            actor = self._scheduler = await in_time(new, partial(self._end_soon, SCHEDULER))
        except ValueError as error:  # the scheduler of a former manager has the name
            with contextlib.suppress(ValueError):
                former = f"{self._service}:{SCHEDULER}"
                await self._end(SCHEDULER, await in_time(partial(ray.get_actor, former, NAMESPACE)))
            raise EngineDeadError(f"the scheduler does not start: {error}") from error
        try:
            address, pid = await actor.start.remote(config)
        except ray.exceptions.RayError as error:
            await self._end(SCHEDULER, actor)
            raise EngineDeadError(f"the scheduler does not start: {error}") from error
        self._know(SCHEDULER, pid)
        return address, pid

    async def stop_scheduler(self) -> None:
        """See `Launcher`."""
        if self._scheduler is not None:
            await self._end(SCHEDULER, self._scheduler)

    async def scheduler_ended(self) -> None:
        """See `Launcher`."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._scheduler.wait.remote()

    # ---- the end

    async def stop(self) -> None:
        """Stops all instances, by force after `STOP_S`, and a local Ray; if Ray is absent, this process."""
        await self._watchers.cancel()
        if ray.is_initialized():
            try:
                await self._stop_instances()
                if self._service is None:
                    await asyncio.to_thread(ray.shutdown)
            except EngineDeadError:
                if not self._is_local:
                    exit_without_ray(STOP_S)
        if self._service is None:  # an interrupted start, or a local Ray that does not answer, has left them
            await asyncio.to_thread(partial(end_children, STOP_S, others=self._workers.values()))

    async def _stop_instances(self) -> None:
        """Raises: EngineDeadError: Ray does not answer. A local one may have got the signal to end, too."""
        actors = [process.actor for process in self._processes.clear()]
        actors += [self._scheduler] if self._scheduler is not None else []
        stops = asyncio.gather(*(settled(actor.stop.remote()) for actor in actors))
        try:
            await asyncio.wait_for(stops, STOP_S)
            is_ending = not ray_lives()
        except TimeoutError:
            is_ending = True
        if self._is_local and is_ending:
            raise EngineDeadError("Ray has ended, or is about to")

        def end_all() -> None:
            for actor in actors:
                ray.kill(actor)
            for name in list(self._groups):
                self._free(name)

        await in_time(end_all, limit_s=END_S)
        if self._is_local:
            # The raylet reaps its workers. If it ended first, they would stay as zombies.
            await asyncio.to_thread(psutil.wait_procs, self._workers.values(), STOP_S)

    async def _watch(self, instance_id: str, process: InstanceProcess) -> None:
        try:
            await process.actor.wait.remote(instance_id)
        except ray.exceptions.RayError:
            worker = self._workers.pop(instance_id, None)
            if self._processes.remove(instance_id) is not None:  # otherwise it was stopped
                self.on_lost(instance_id)
                if not process.instances:
                    if worker is not None:  # it goes on if only its raylet has ended
                        with contextlib.suppress(psutil.NoSuchProcess):
                            worker.kill()
                    await self._end(process.name, process.actor)
