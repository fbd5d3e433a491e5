"""Moves one request between two busy simulated instances and measures the cost for it and for them."""

import asyncio
from dataclasses import dataclass
from typing import Literal

from migration.messages import FinalState, KvPart, MigrationId
from pd_serve.comm.outputs import OutputBatch
from pd_serve.simulated_engine.outputs import SimulatedPayload
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.config import NetworkSettings, SimulationConfig
from pd_serve.simulation.simulated_cluster import SimulatedCluster
from pd_serve.simulation.virtual_time import VirtualLoop
from router.request import NewRequest

Mode = Literal["live", "blocking", "recompute"]

#: Tokens in the batch of the source.
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """The cost of one migration; times in milliseconds.

    Attributes:
        away_ms: Time from leaving the source's batch until ready for the destination's next step: the paper's
            downtime. For a recompute: until the destination's first token, minus one step.
        step_ms: Mean decode step of the source before the migration.
        step_migrating_ms: The same during the copy; `step_ms` if no step began then.
    """

    away_ms: float
    step_ms: float
    step_migrating_ms: float


def measure_migration(
    num_tokens: int, mode: Mode, engine: EngineSettings, network: NetworkSettings
) -> MigrationCost:
    """Moves one of `BATCH_TOKENS / num_tokens` equal requests to an instance that runs one request less."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_measure(num_tokens, mode, engine, network))


class _Stopwatch:
    """Records when a request leaves the source's batch and when it is ready for the destination's."""

    def __init__(self, source: SimulatedEngine, destination: SimulatedEngine) -> None:
        self.left_at = self.ready_at = 0.0
        self.step_ms: float | None = None  # of the source, until the request has left
        steps = _StepTimer(source)
        loop = asyncio.get_running_loop()
        next_stage, commit = source.next_stage, destination.commit

        async def noted_next_stage(*args: object, **options: object) -> KvPart | FinalState:
            answer = await next_stage(*args, **options)  # type: ignore[arg-type]
            if isinstance(answer, FinalState):
                self.left_at = loop.time()
                self.step_ms = steps.mean_ms()
            return answer

        async def noted_commit(migration_id: MigrationId, state: FinalState) -> None:
            self.ready_at = loop.time()
            await commit(migration_id, state)

        source.next_stage = noted_next_stage  # type: ignore[method-assign]
        destination.commit = noted_commit  # type: ignore[method-assign]


async def _measure(
    num_tokens: int, mode: Mode, engine: EngineSettings, network: NetworkSettings
) -> MigrationCost:
    loop = asyncio.get_running_loop()
    started: set[str] = set()

    def deliver(batch: OutputBatch) -> None:
        started.update(output.request_id for output in batch.outputs)

    config = SimulationConfig(
        [], {"neutral": 2}, "round-robin", {"neutral": engine}, network=network, every_step=True
    )
    cluster = SimulatedCluster(config, deliver)
    await cluster.start()
    num_requests = 2 * max(1, BATCH_TOKENS // num_tokens) - 1  # the destination has room for one more
    for number in range(num_requests):
        payload = SimulatedPayload(str(number), num_tokens, 400, 0, loop.time(), (), number)
        cluster.frontend.requests.submit(payload.request_id, payload.encode(), NewRequest(num_tokens))
        await asyncio.sleep(0.01)
    while len(started) < num_requests:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)

    first, second = cluster.launcher.instances.values()
    moved = next(iter(first.engine.batcher.running)).request_id
    usual = _StepTimer(first.engine)
    await asyncio.sleep(0.5)
    step_ms = usual.mean_ms() or 0.0
    watch = _Stopwatch(first.engine, second.engine)
    report = await cluster.frontend.migrate(moved, second.name, mode)
    away_ms = (watch.ready_at - watch.left_at) * 1e3 if mode != "recompute" else report.downtime_ms - step_ms
    await cluster.stop()
    return MigrationCost(away_ms, step_ms, watch.step_ms or step_ms)


class _StepTimer:
    """Mean duration of an engine's steps from now on."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._steps, self._busy_s = self._engine.steps, self._engine.busy_s

    def mean_ms(self) -> float | None:
        """None if there was no step."""
        steps = self._engine.steps - self._steps
        return (self._engine.busy_s - self._busy_s) / steps * 1e3 if steps else None
