"""A cluster whose processes can fail: several API servers, the manager, and all that the platform runs."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from pd_serve.comm.membership import MANAGER
from pd_serve.comm.outputs import OutputBatch
from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.frontend.frontend import Frontend
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.observe.recorder import Observer, RecomputeReason, RequestRecorder
from pd_serve.observe.timeline import Timeline
from pd_serve.platform.placement import Placement
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, SimulationConfig
from pd_serve.simulation.faults.links import EncodedOutputs, FaultyNetwork, FaultyWire
from pd_serve.simulation.faults.platform import PlatformLauncher, SimulatedPlatform
from pd_serve.simulation.faults.process_loop import ProcessLoop, SimulatedProcess
from pd_serve.simulation.faults.schedule import FaultyClusterShape
from router.dispatcher import Dispatcher
from router.load import ROLES
from router.policies import policy_set
from router.scaling import PoolBounds

#: Maximum number of instances at a time.
MAX_INSTANCES = 16

#: Interval at which the platform looks whether the manager has ended itself, in seconds; as Ray Serve's.
HEALTH_PERIOD_S = 2.0


@dataclass(eq=False)
class SimulatedApiServer:
    """One API server: its process, and its part of the control plane."""

    name: str
    process: SimulatedProcess
    wire: FaultyWire
    frontend: Frontend


@dataclass(eq=False)
class ManagerHandle:
    """One manager. `is_open` as soon as it has started or taken over."""

    process: SimulatedProcess
    wire: FaultyWire
    launcher: PlatformLauncher
    manager: Manager
    is_open: bool = False


class CountedNotices:
    """Drops what the manager tells the operator."""

    def step(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Recoveries(Observer):
    """Counts what was lost and recovered."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def lost(self, request: Timeline, instance: str, reason: RecomputeReason) -> None:
        self._counts[reason] += 1

    def reconciled(self, kind: str, number: int) -> None:
        if kind not in get_args(RecomputeReason):
            self._counts[kind] += number


class FaultyCluster:
    """All processes of a cluster.

    Attributes:
        api_servers: The living ones, in the order of their starts.
        manager: The latest manager; None while there is none.
        num_first_starts: Number of managers that have found no instances.
        recoveries: Recomputed requests by reason, and reconciliations by kind.
        on_failure: Called with (what, error) when a part of the cluster fails in an unforeseen way.
    """

    def __init__(
        self,
        loop: ProcessLoop,
        shape: FaultyClusterShape,
        rng: random.Random,
        deliver: Callable[[OutputBatch], None],
    ) -> None:
        self.shape = shape
        self.loop = loop
        self.engine = EngineSettings(
            COST_MODELS["a10-llama-7b"],
            num_blocks=shape.num_blocks,
            chunk_tokens=shape.chunk_tokens,
            prefix_caching=shape.prefix_caching,
            async_scheduling=shape.async_scheduling,
            sampled=shape.sampled,
        )
        config = SimulationConfig(
            requests=(),
            instances=shape.instances,
            policy=shape.policy,
            engines={"neutral": self.engine},
            start_instance_s=shape.start_instance_s,
            orphan_s=shape.orphan_s,
        )
        self.network = FaultyNetwork(
            loop, rng, NetworkSettings(), self.engine.kv_bytes_per_token * self.engine.block_tokens / 8
        )
        self.platform = SimulatedPlatform(loop, rng, self.network, config)
        self.api_servers: list[SimulatedApiServer] = []
        self.manager: ManagerHandle | None = None
        self.managers: list[ManagerHandle] = []
        self.on_failure: Callable[[str, BaseException], None] = lambda what, error: None
        self._deliver = deliver
        self._rng = rng
        self._policies = policy_set(shape.policy, **shape.settings)
        self._started = 0
        self.num_first_starts = 0
        self.recoveries: Counter[str] = Counter()

    async def start(self) -> None:
        """Returns when the scheduler runs, and every instance has reported to every API server."""
        self.start_manager()
        self._check_health()
        for _ in range(self.shape.api_servers):
            self.start_api_server()
        while not self._is_ready():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # tasks of the start
        while self._is_resizing():  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def _is_ready(self) -> bool:
        all_seen = all(self._sees_all(api_server) for api_server in self.api_servers)
        return all_seen and self.platform.scheduler is not None

    def _sees_all(self, api_server: SimulatedApiServer) -> bool:
        loads = list(api_server.frontend.instances.loads)
        if self.shape.autoscale:
            return {load.instance_id for load in loads} == set(self.platform.instances)
        return len(loads) == sum(self.shape.instances.values())

    def _is_resizing(self) -> bool:
        """Whether a pool changes its size as soon as it serves."""
        assert self.manager is not None
        manager = self.manager.manager
        return bool(manager._starter.rows() or manager._stopper.leaving)

    # ---- API servers

    def start_api_server(self) -> None:
        name = f"api-{self._started}"
        self._started += 1
        if self.shape.one_process and self.manager is not None:
            process = self.manager.process
        else:
            process = self.loop.spawn(name)
        process.run(self._construct_api_server, name, process)

    def _construct_api_server(self, name: str, process: SimulatedProcess) -> None:
        wire = FaultyWire(name, self.network)
        frontend = Frontend(
            wire,
            self._find_manager,
            EncodedOutputs(),
            self._deliver,
            Dispatcher(self._policies, random.Random(self._rng.random()), self.loop.time),
            num_slots=MAX_INSTANCES * 4,
            orphan_s=self.shape.orphan_s,
            recorder=RequestRecorder([Recoveries(self.recoveries)]),
            clock=self.loop.time,
        )
        self.api_servers.append(SimulatedApiServer(name, process, wire, frontend))

    @property
    def names(self) -> set[str]:
        """Names of all instances and API servers that there were."""
        return self.platform.names | {f"api-{number}" for number in range(self._started)}

    def kill_api_server(self, api_server: SimulatedApiServer) -> None:
        self.api_servers.remove(api_server)
        api_server.process.kill()

    # ---- managers

    def start_manager(self, process: SimulatedProcess | None = None) -> None:
        """Starts a manager, which takes over the instances of the last one or starts the first ones."""
        process = process or self.loop.spawn(MANAGER)
        self.manager = handle = process.run(self._construct_manager, process)
        self.managers.append(handle)
        process.start(self._open_manager(handle))

    def _construct_manager(self, process: SimulatedProcess) -> ManagerHandle:
        shape = self.shape
        config = ManagerConfig(
            model="simulated",
            instances=dict.fromkeys(ROLES, 0) | shape.instances,
            autoscale={role: PoolBounds(*bounds) for role, bounds in shape.autoscale.items()},
            max_instances=MAX_INSTANCES,
            policies=self._policies,
            engine_args={role: {} for role in ROLES},
            placements={role: Placement() for role in ROLES},
            host="simulated",
            keys=CurveKeys(b"", b""),
        )
        wire = FaultyWire(MANAGER, self.network)
        launcher = self.platform.launcher(process)
        manager = Manager(config, wire, launcher, CountedNotices())
        return ManagerHandle(process, wire, launcher, manager)

    async def _open_manager(self, handle: ManagerHandle) -> None:
        try:
            if not await handle.manager.take_over():
                self.num_first_starts += 1
                await handle.manager.start()
            handle.is_open = True
        except PdServeError:
            self.kill_manager(handle)  # the platform starts another one
        except Exception as error:
            self.on_failure("the start of a manager", error)
            self.kill_manager(handle)

    def kill_manager(self, handle: ManagerHandle) -> None:
        """Ends a manager as SIGKILL does. The platform starts another one after a few seconds."""
        handle.process.kill()
        if self.manager is handle:
            self.manager = None
            self.loop.outside_at(self.loop.now + self._rng.uniform(0.5, 8.0), self._replace_manager)

    def is_left(self, name: str) -> bool:
        """An instance that a former manager has left, or was starting, and no present one has adopted."""
        present = [h.manager for h in self.managers if h.process.is_alive and not h.manager.is_superseded]
        return all(name not in manager.register for manager in present)

    def _check_health(self) -> None:
        """Replaces the manager if another one has taken over; that one may be an earlier one, which dies."""
        handle = self.manager
        if handle is not None and handle.process.is_running and handle.manager.is_superseded:
            self.kill_manager(handle)
        self.loop.outside_at(self.loop.now + HEALTH_PERIOD_S, self._check_health)

    def _replace_manager(self) -> None:
        if self.manager is None:
            self.start_manager()

    async def _find_manager(self) -> str:
        handle = self.manager
        if handle is None or not handle.is_open:
            raise EngineDeadError("the manager is absent")
        if handle.process.is_suspended:
            await asyncio.Event().wait()  # a call that is not answered
        return handle.manager.address
