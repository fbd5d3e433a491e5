"""A whole cluster in one event loop: the real llumlets, request router and scheduler on simulated parts."""

import asyncio
import logging
import random
from collections.abc import Callable

from migration.bounds import MigrationBounds
from migration.messages import InstanceId
from migration.transport.local import LocalTransport
from pd_serve.comm.messages import InstanceInfo, StartInstance, StopInstance, TokenHeader
from pd_serve.comm.outputs import OutputBatch
from pd_serve.frontend.request_tracker import RequestTracker
from pd_serve.instance.llumlet import Llumlet
from pd_serve.manager.instance_pool import InstancePool
from pd_serve.scheduler.scheduler_process import SCHEDULER, SchedulerProcess
from pd_serve.simulated_engine.outputs import SimulatedBatch, SimulatedCodec, SimulatedOutput, decode_payload
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire
from router.dispatcher import Dispatcher
from router.load import ROLES
from router.policies import policy_set

logger = logging.getLogger(__name__)

#: The most instances that may live at a time beyond those at the beginning.
SPARE_SLOTS = 1024


class SimulatedInstance:
    """One instance: engine, llumlet, KV transport and wire."""

    def __init__(
        self, name: str, role: str, config: SimulationConfig, network: SimulatedNetwork, now: float
    ) -> None:
        self.name = name
        self.role = role
        self.started_at = now
        self.wire = SimulatedWire(name, network)
        self.transport: LocalTransport = network.fabric.transport(name)
        bounds = MigrationBounds(max_outgoing=config.max_migrations, max_incoming=config.max_migrations)
        self.llumlet = Llumlet(
            InstanceId(name),
            role,
            self.wire,  # type: ignore[arg-type]
            self.transport,
            bounds=bounds,
            on_fatal=self._failed,
        )
        leaving, entering = network.fabric.leaving, network.fabric.entering

        def is_copying() -> bool:
            return bool(leaving[name] or entering[name])

        settings = config.engines.get(role) or config.engines["neutral"]
        self.engine = SimulatedEngine(
            settings, decode_payload, self._publish, self.llumlet.events, is_copying
        )
        self.transport.register(self.engine.regions)
        self.llumlet.start(self.engine)
        self.failure: BaseException | None = None

    @property
    def info(self) -> InstanceInfo:
        facts = self.engine.facts
        return InstanceInfo(
            instance_id=self.name,
            role=self.role,
            address=self.llumlet.address,
            node="simulated",
            pid=0,
            no_migration=facts.no_migration,
            supported_tasks=["generate"],
            max_model_len=facts.max_model_len,
            num_blocks=facts.num_blocks,
            block_tokens=facts.block_tokens,
        )

    async def stop(self) -> None:
        """In the middle of whatever it does, as when its process ends."""
        await self.engine.stop()
        await self.llumlet.close()
        self.transport.close()
        await self.wire.close()

    def _publish(self, client: str, outputs: list[SimulatedOutput], spans: list[tuple[int, int]]) -> None:
        self.wire.send_to(client, [TokenHeader(self.name, spans), SimulatedBatch(outputs)])

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: should never happen", self.name, exc_info=error)
        self.failure = error


class SimulatedCluster:
    """The instances that the fleet starts and stops, the router in front of them, and what they have done.

    Args:
        deliver: Takes batches of outputs, as an API server would.
    """

    def __init__(self, config: SimulationConfig, deliver: Callable[[OutputBatch], None]) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        engine = config.engines["neutral"]
        # One number per block is copied; it stands for the KV of a block's tokens.
        scale = engine.kv_bytes_per_token * engine.block_tokens / 8
        self.network = SimulatedNetwork(config.network, scale)
        self.instances: dict[str, SimulatedInstance] = {}
        self.scaling: list[tuple[float, str]] = []
        self.instance_s = 0.0
        self.preemptions = 0
        self.preemption_loss_s = 0.0
        self.steps = 0
        self.failures: list[str] = []
        self.scheduler: SchedulerProcess | None = None
        self._policies = policy_set(config.policy, **config.overrides)
        most = sum(config.instances.values()) + (SPARE_SLOTS if config.autoscale else 0)
        self.router = RequestTracker(
            "api",
            SimulatedWire("api", self.network),  # type: ignore[arg-type]
            SimulatedCodec(),
            deliver,
            block_tokens=engine.block_tokens,
            num_slots=most,
            clock=self._loop.time,
            on_scaling=self._on_scaling,
            on_decided=lambda report: self.fleet.on_decided(report),
            dispatcher=Dispatcher(self._policies, random.Random(config.seed), self._loop.time),
        )
        self.fleet = InstancePool(
            self.router,
            self._start_instance,
            self._stop_instance,
            max_instances=most,
            instances=dict.fromkeys(ROLES, 0) | config.instances,
            policy=config.policy,
        )

    async def start(self) -> None:
        """Returns when every instance has reported."""
        for role, count in self.config.instances.items():
            for number in range(count):
                self.router.join(self._add_instance(f"{role}-{number}", role, self._loop.time()))
        self.start_scheduler()
        await self.router.wait_for_reports()

    def start_scheduler(self) -> None:
        """Also a new one after `kill_scheduler`."""
        wire = SimulatedWire(SCHEDULER, self.network)
        self.scheduler = SchedulerProcess(
            SCHEDULER,
            wire,
            self._policies,
            autoscale=self.config.autoscale or None,
            seed=self.config.seed,
            on_failure=lambda error: self.failures.append(f"scheduler: {error!r}"),
        )
        self.fleet.scheduler_started(self.scheduler.address, pid=0)

    async def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        await self.scheduler.close()
        self.network.silence(self.scheduler.address)
        self.scheduler = None
        self.fleet.scheduler_lost()

    async def kill_instance(self, name: str) -> None:
        """Its process dies; the router is told, as by whoever watches processes."""
        instance = self.instances.pop(name)
        self._account(instance)
        self.network.cut(name)
        await instance.stop()
        self.router.leave(name)

    async def stop(self) -> None:
        await self.fleet.close()
        if self.scheduler is not None:
            await self.scheduler.close()
        for instance in list(self.instances.values()):
            self._account(instance)
            await instance.stop()
        await self.router.close()

    async def check_integrity(self) -> list[str]:
        """Everything that does not add up at rest; see DESIGN section 7."""
        problems = await self.router.check_integrity() + self.failures
        problems += [f"{i.name} failed: {i.failure!r}" for i in self.instances.values() if i.failure]
        return problems

    @property
    def num_leaked_blocks(self) -> int:
        """Blocks that are not free now; at rest there should be none."""
        pools = [instance.engine.batcher.pool for instance in self.instances.values()]
        return sum(pool.num_blocks - pool.num_free for pool in pools)

    # ---- what starts and stops, as the fleet says

    def _on_scaling(self, wanted: StartInstance | StopInstance) -> None:
        what = (
            f"start a {wanted.role} instance"
            if isinstance(wanted, StartInstance)
            else f"stop {wanted.instance_id}"
        )
        self.scaling.append((self._loop.time(), f"{what}: {wanted.reason}"))
        self.fleet.on_scaling(wanted)

    async def _start_instance(self, name: str, role: str) -> InstanceInfo:
        began = self._loop.time()
        await asyncio.sleep(self.config.start_instance_s)
        return self._add_instance(name, role, began)

    def _add_instance(self, name: str, role: str, began: float) -> InstanceInfo:
        instance = self.instances[name] = SimulatedInstance(name, role, self.config, self.network, began)
        return instance.info

    async def _stop_instance(self, name: str) -> None:
        instance = self.instances.pop(name)
        self._account(instance)
        await instance.stop()

    def _account(self, instance: SimulatedInstance) -> None:
        self.instance_s += self._loop.time() - instance.started_at
        batcher = instance.engine.batcher
        self.preemptions += batcher.preemptions
        self.preemption_loss_s += batcher.preemption_loss_s
        self.steps += instance.engine.steps
