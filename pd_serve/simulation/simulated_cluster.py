"""A cluster on one event loop: manager, scheduler, llumlets and frontend on simulated engines and wires."""

import asyncio
import random
from collections.abc import Callable

from pd_serve.comm.membership import MANAGER
from pd_serve.comm.outputs import OutputBatch
from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.frontend import Frontend
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.platform.placement import Placement
from pd_serve.simulated_engine.outputs import SimulatedCodec
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.simulated_launcher import SimulatedLauncher
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire
from router.dispatcher import Dispatcher
from router.load import ROLES

#: Maximum number of instances at a time, in addition to those at the start, in a cluster that scales.
SPARE_SLOTS = 1024


class SimulatedNotices:
    """Ignores progress and warnings of the manager."""

    def step(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class SimulatedCluster:
    """The control plane of a cluster with one API server, and faults for tests.

    Args:
        deliver: Receives batches of outputs.

    Attributes:
        frontend: The frontend of the API server.
        manager: None while the manager is absent.
        scaling: (time, decision and its reason) for every instance started or stopped while serving.
    """

    def __init__(self, config: SimulationConfig, deliver: Callable[[OutputBatch], None]) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        engine = config.engines["neutral"]
        # A copy of a block is a copy of one number of 8 bytes, which represents the KV of the block's tokens.
        scale = engine.kv_bytes_per_token * engine.block_tokens / 8
        self.network = SimulatedNetwork(config.network, scale)
        self.launcher = SimulatedLauncher(config, self.network)
        self.manager: Manager | None = None
        self.scaling: list[tuple[float, str]] = []
        self._policies = config.policies
        self._max_instances = sum(config.instances.values()) + (SPARE_SLOTS if config.autoscale else 0)
        self.frontend = Frontend(
            SimulatedWire("api", self.network),
            self._find_manager,
            SimulatedCodec(),
            deliver,
            Dispatcher(self._policies, random.Random(config.seed), self._loop.time),
            num_slots=self._max_instances,
            orphan_s=config.orphan_s,
            clock=self._loop.time,
        )

    async def start(self) -> None:
        """Returns when every instance has reported."""
        self.manager = self._make_manager()
        await self.manager.start()
        await self.frontend.wait_for_instances()

    async def stop(self) -> None:
        await self.kill_manager()
        await self.launcher.stop()
        await self.frontend.close()

    # ---- faults

    async def kill_manager(self) -> None:
        """Ends the manager as if its process had died. The other processes continue."""
        if (manager := self.manager) is not None:
            self.manager = None
            await manager.close()

    async def replace_manager(self) -> None:
        """Starts another manager, which takes over the running instances."""
        self.manager = self._make_manager()
        await self.manager.take_over()

    async def kill_instance(self, name: str) -> None:
        await self.launcher.kill_instance(name)

    async def kill_scheduler(self) -> None:
        """Ends the scheduler as if its process had died. The manager starts another one."""
        await self.launcher.kill_scheduler()

    # ---- checks at the end

    async def check_integrity(self) -> list[str]:
        """Every violated invariant of the cluster at rest."""
        return await self.frontend.check_integrity() + self.launcher.problems()

    @property
    def num_leaked_blocks(self) -> int:
        return self.launcher.num_leaked_blocks

    def _make_manager(self) -> Manager:
        config = self.config
        manager_config = ManagerConfig(
            model="simulated",
            instances=dict.fromkeys(ROLES, 0) | config.instances,
            autoscale=dict(config.autoscale),
            max_instances=self._max_instances,
            policies=self._policies,
            engine_args={role: {} for role in ROLES},
            placements={role: Placement() for role in ROLES},
            host="simulated",
            keys=CurveKeys(b"", b""),
        )
        wire = SimulatedWire(MANAGER, self.network)
        manager = Manager(manager_config, wire, self.launcher, SimulatedNotices())
        manager.log.observer = self._on_decision
        return manager

    def _on_decision(self, what: str) -> None:
        if " is started: " in what or " is stopped: " in what:
            self.scaling.append((self._loop.time(), what))

    async def _find_manager(self) -> str:
        if self.manager is None:
            raise EngineDeadError("the manager is absent")
        return self.manager.address
