"""The launcher of production: runs the processes of a service as Ray actors."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import SCHEDULER, InstanceInfo
from pd_serve.comm.timing import INSTANCE_LEASE_S, RAY_CALL_S
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.ray_actors import InstanceActor, SchedulerActor
from pd_serve.manager.ray_start import PASSING_ERRORS, end_children, start_ray
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Ray's namespace of actors that outlive the manager. Their names are "service:name".
NAMESPACE = "pd_serve"

#: Time for instances to end by themselves before they are killed.
STOP_S = 3.0

#: Errors of `ray.init`.
CONNECT_ERRORS = (*PASSING_ERRORS, ValueError)


class RayLauncher:
    """Implements `pd_serve.manager.launcher.Launcher` for the instances and the scheduler of one service.

    Args:
        address: Address of a running cluster; None starts a local one that ends with this process.
        environment: Environment variables of every instance's process.
        on_lost: Called with the id of an instance whose process has died.
        python: Command that runs the script of an instance's process; None for this Python.
        service: With a name, actors outlive this process, and the next manager with that name finds them.
            This process is connected to Ray already, and Ray continues after it.
    """

    def __init__(
        self,
        address: str | None,
        environment: dict[str, str],
        on_lost: Callable[[str], None] = lambda instance_id: None,
        python: str | None = None,
        service: str | None = None,
    ) -> None:
        self._address = address
        self._python = python
        self._environment = environment
        self._service = service
        self.on_lost = on_lost
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        self._waits_for: dict[str, str] = {}
        self._leaves_starts = False
        self._scheduler: Any = None
        self._pids: dict[str, int] = {}
        self._watchers = BackgroundTasks()

    def connect(self) -> None:
        """Starts or joins Ray. Blocks for seconds.

        Raises:
            PdServeError: There is no cluster at the address, or a local one does not start.
        """
        if self._service is not None:
            return
        local = self._address is None

        def init() -> None:
            ray.init(
                address=self._address or "local",
                include_dashboard=False if local else None,
                logging_level=logging.ERROR,
                object_store_memory=80 * 2**20 if local else None,
                # A local cluster's processes inherit this one's environment.
                runtime_env=None if local else {"env_vars": self._environment},
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

    def launch(self, name: str, placement: Placement) -> None:
        """See `Launcher`."""
        if name in self._actors:
            return
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, **self._lasting(name)}
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
            self._actors[name] = ray.remote(InstanceActor).options(**options).remote(name)
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
        actor = self._actors[name]
        try:
            await self._placed(name)
            info: InstanceInfo = await actor.start.remote(config)
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
        self._keep(info, actor)
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

    def _keep(self, info: InstanceInfo, actor: Any) -> None:
        self._actors[info.instance_id] = actor
        self._pids[info.instance_id] = info.pid
        self._watchers.start(self._watch(info.instance_id, actor))

    async def stop_instance(self, name: str) -> None:
        """See `Launcher`."""
        actor = self._actors.pop(name, None)
        if actor is None:
            return
        await asyncio.wait([asyncio.ensure_future(_settled(actor.stop.remote()))], timeout=STOP_S)
        ray.kill(actor)
        self._free(name)

    def _discard(self, name: str) -> None:
        """Ends an instance that is not ready, and frees its resources."""
        if (actor := self._actors.pop(name, None)) is not None and ray.is_initialized():
            ray.kill(actor)
            self._free(name)

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
        actors = await _in_time(self._named_actors)
        if (scheduler := actors.pop(SCHEDULER, None)) is not None:
            ray.kill(scheduler)  # it keeps no state, and the next one is ready in a second
        asked = {name: asyncio.ensure_future(_settled(a.found.remote())) for name, a in actors.items()}
        if asked:
            await asyncio.wait(asked.values(), timeout=INSTANCE_LEASE_S)
        for name, actor in actors.items():
            if asked[name].cancel():
                info, notes = None, None
            elif (found := asked[name].result()) is None:
                continue  # it has died
            else:
                info, notes = found
            with contextlib.suppress(ValueError):
                group = f"{self._service}:{name}"
                self._groups[name] = await _in_time(partial(ray.util.get_placement_group, group))
            if info is None:
                self._actors[name] = actor
                self._discard(name)
                continue
            self._keep(info, actor)
            infos.append(info)
            found_notes += [notes] if notes is not None else []
        living = [info for info in infos if info.instance_id in self._actors]  # some have died meanwhile
        return living, max(found_notes, key=lambda notes: notes.age, default=None)

    def _named_actors(self) -> dict[str, Any]:
        prefix = f"{self._service}:"
        found = {}
        for row in ray.util.list_named_actors(all_namespaces=True):
            if row["namespace"] == NAMESPACE and row["name"].startswith(prefix):
                with contextlib.suppress(ValueError):  # the actor has died meanwhile
                    found[row["name"].removeprefix(prefix)] = ray.get_actor(row["name"], NAMESPACE)
        return found

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """See `Launcher`."""
        calls = [asyncio.ensure_future(_settled(a.keep_notes.remote(notes))) for a in self._actors.values()]
        done, _ = await asyncio.wait(calls, timeout=STOP_S) if calls else (set(), set())
        return max((task.result() or 0 for task in done), default=0)

    # ---- the scheduler

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        """See `Launcher`."""
        options = {"num_cpus": 0, "max_concurrency": 10, **self._lasting(SCHEDULER)}
        try:
            actor = self._scheduler = ray.remote(SchedulerActor).options(**options).remote()
        except ValueError as error:  # the scheduler of a former manager has the name
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(f"{self._service}:{SCHEDULER}", NAMESPACE))
            raise EngineDeadError(f"the scheduler does not start: {error}") from error
        try:
            address, pid = await actor.start.remote(config)
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            raise EngineDeadError(f"the scheduler does not start: {error}") from error
        self._pids[SCHEDULER] = pid
        return address, pid

    async def stop_scheduler(self) -> None:
        """See `Launcher`."""
        if self._scheduler is not None:
            ray.kill(self._scheduler)

    async def scheduler_ended(self) -> None:
        """See `Launcher`."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._scheduler.wait.remote()

    # ---- the end

    async def stop(self) -> None:
        """Stops all instances, kills those that do not end within `STOP_S`, and ends a local Ray."""
        await self._watchers.cancel()
        if ray.is_initialized():
            await self._stop_instances()
            if self._service is None:
                await asyncio.to_thread(ray.shutdown)
        if self._service is None:
            await asyncio.to_thread(end_children, STOP_S)  # left for example by an interrupted start

    async def _stop_instances(self) -> None:
        actors = [*self._actors.values(), *([self._scheduler] if self._scheduler is not None else [])]
        stops = [asyncio.ensure_future(_settled(actor.stop.remote())) for actor in actors]
        if stops:
            await asyncio.wait(stops, timeout=STOP_S)
        for actor in actors:
            ray.kill(actor)
        self._actors.clear()
        for name in list(self._groups):
            self._free(name)
        if self._address is None and self._service is None:
            # The raylet reaps its workers. If it ended first, they would stay as zombies.
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
            if self._actors.pop(instance_id, None) is not None:  # otherwise it was stopped
                self._free(instance_id)
                self.on_lost(instance_id)


async def _in_time(call: Callable[[], T]) -> T:
    """The result of a blocking call to Ray. Raises: EngineDeadError: Ray does not answer."""
    try:
        async with asyncio.timeout(RAY_CALL_S):
            return await asyncio.to_thread(call)
    except TimeoutError as error:
        raise EngineDeadError(f"Ray has not answered for {RAY_CALL_S:.0f} s") from error


async def _settled(reference: Any) -> Any:
    """The result of a call; None if the actor has died."""
    try:
        return await reference
    except ray.exceptions.RayError as error:
        logger.debug("an actor has ended before it answered: %s", error)
        return None
