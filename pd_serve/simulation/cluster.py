"""A whole cluster in one event loop: the real llumlets, request router and scheduler on simulated parts."""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable

from migration.bounds import MigrationBounds
from migration.messages import InstanceId
from migration.tasks import OwnedTasks
from migration.transport.local import LocalTransport
from pd_serve.instance import InstanceInfo
from pd_serve.llumlet import Llumlet
from pd_serve.messages import StartInstance, StopInstance, TokenHeader
from pd_serve.request_router import RequestRouter
from pd_serve.scheduler_process import SCHEDULER, SchedulerProcess
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.engine import SimulatedEngine
from pd_serve.simulation.network import SimulatedNetwork, SimulatedWire
from pd_serve.simulation.outputs import SimulatedBatch, SimulatedCodec, SimulatedOutput, decode_payload
from router.book import LoadBook
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
    """Starts and stops instances as the scheduler wants, and keeps what they have done.

    Args:
        deliver: Takes batches of outputs, as an API server would.
    """

    def __init__(self, config: SimulationConfig, deliver: Callable[[SimulatedBatch], None]) -> None:
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
        self._tasks = OwnedTasks(lambda error: self.failures.append(repr(error)))
        self._serial = {role: itertools.count() for role in ("prefill", "decode", "neutral")}
        self._starting: Counter[str] = Counter()
        self._policies = policy_set(config.policy, **config.overrides)
        most = sum(config.instances.values()) + (SPARE_SLOTS if config.autoscale else 0)
        self.router = RequestRouter(
            "api",
            SimulatedWire("api", self.network),  # type: ignore[arg-type]
            SimulatedCodec(),
            deliver,
            block_tokens=engine.block_tokens,
            num_slots=most,
            clock=self._loop.time,
            on_scaling=self._on_scaling,
            book=LoadBook(self._policies, random.Random(config.seed), self._loop.time),
        )

    async def start(self) -> None:
        """Returns when every instance has reported."""
        for role, count in self.config.instances.items():
            for _ in range(count):
                self._start_now(role)
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
        self.router.instances.introduce_scheduler(self.scheduler.name, self.scheduler.address)

    async def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        await self.scheduler.close()
        self.network.silence(self.scheduler.address)
        self.scheduler = None

    async def kill_instance(self, name: str) -> None:
        """Its process dies; the router is told, as by whoever watches processes."""
        instance = self.instances.pop(name)
        self._account(instance)
        self.network.cut(name)
        await instance.stop()
        self.router.leave(name)

    async def stop(self) -> None:
        await self._tasks.cancel()
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

    # ---- scaling

    def _on_scaling(self, wanted: StartInstance | StopInstance) -> None:
        now = self._loop.time()
        if isinstance(wanted, StartInstance):
            self.scaling.append((now, f"start a {wanted.role} instance: {wanted.reason}"))
            self._starting[wanted.role] += 1
            self._announce()
            self._tasks.start(self._start_later(wanted.role))
        elif wanted.instance_id in self.instances:
            self.scaling.append((now, f"stop {wanted.instance_id}: {wanted.reason}"))
            self._tasks.start(self._stop(wanted.instance_id))

    async def _start_later(self, role: str) -> None:
        began = self._loop.time()
        await asyncio.sleep(self.config.start_instance_s)
        self._starting[role] -= 1
        self._start_now(role, began)
        self._announce()

    def _start_now(self, role: str, began: float | None = None) -> None:
        name = f"{role}-{next(self._serial[role])}"
        now = self._loop.time() if began is None else began
        instance = SimulatedInstance(name, role, self.config, self.network, now)
        self.instances[name] = instance
        self.router.join(instance.info)

    async def _stop(self, name: str) -> None:
        instance = self.instances.pop(name)
        self.router.leave(name)
        self._account(instance)
        await instance.stop()

    def _announce(self) -> None:
        self.router.instances.starting = {role: count for role, count in self._starting.items() if count}

    def _account(self, instance: SimulatedInstance) -> None:
        self.instance_s += self._loop.time() - instance.started_at
        batcher = instance.engine.batcher
        self.preemptions += batcher.preemptions
        self.preemption_loss_s += batcher.preemption_loss_s
        self.steps += instance.engine.steps
