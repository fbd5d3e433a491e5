"""The simulated side of `pd-serve bench simulator`: instances like the real ones, in virtual time."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from loadtests.bench.workload import Latencies
from pd_serve.comm.outputs import OutputBatch
from pd_serve.config import DEFAULT_POLICY
from pd_serve.errors import PdServeError
from pd_serve.platform.cpu import CPU_PREFILL_CHUNK_TOKENS, CPU_STAGE_BYTES_PER_S, is_cpu_build
from pd_serve.simulated_engine.cost_model import CostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, SimulationConfig, TraceRequest
from pd_serve.simulation.result import SimulationResult
from pd_serve.simulation.simulate import Simulation
from pd_serve.simulation.virtual_time import VirtualLoop


def engines(about: dict[str, int], model: CostModel) -> dict[str, EngineSettings]:
    """Simulated engines by role, like instances of `pd-serve serve`.

    Args:
        about: See `MeasuredEngine.about`.
    """
    engine = EngineSettings(
        model,
        num_blocks=about["num_blocks"],
        block_tokens=about["block_tokens"],
        max_num_seqs=about["max_num_seqs"],
        chunk_tokens=about["max_num_batched_tokens"],
        prefix_caching=True,
        kv_bytes_per_token=about["kv_bytes_per_token"],
    )
    chunk = CPU_PREFILL_CHUNK_TOKENS if is_cpu_build() else engine.chunk_tokens
    return {"neutral": engine, "prefill": replace(engine, chunk_tokens=chunk)}


def config(
    requests: Sequence[TraceRequest],
    instances: dict[str, int],
    by_role: dict[str, EngineSettings],
    seed: int,
) -> SimulationConfig:
    """A cluster on one machine, with the policies of `pd-serve serve`."""
    network = NetworkSettings(kv_latency_s=0.001, kv_bytes_per_s=CPU_STAGE_BYTES_PER_S)
    return SimulationConfig(requests, instances, DEFAULT_POLICY, by_role, network=network, seed=seed)


def simulated(wanted: SimulationConfig) -> Latencies:
    """Runs it. Has an event loop of its own, so call it in another thread than a running one.

    Raises:
        PdServeError: A request failed, or something does not add up at the end.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_run(wanted))


async def _run(wanted: SimulationConfig) -> Latencies:
    clients = _Clients(wanted)
    result = await clients.run()
    if problems := _problems(result):
        raise PdServeError(f"the simulation is wrong: {problems[0]}")
    clients.seen.request_s = [record.request_s for record in result.records]
    clients.seen.ttft_s = [record.prefill_s for record in result.records]
    return clients.seen


def _problems(result: SimulationResult) -> list[str]:
    failed = sum(bool(r.failed or r.lost or r.duplicated or r.wrong) for r in result.records)
    return [*([f"{failed} requests have failed"] if failed else []), *result.integrity]


class _Clients(Simulation):
    """Keeps every gap between two tokens, where a simulation keeps the longest only."""

    def __init__(self, wanted: SimulationConfig) -> None:
        super().__init__(wanted)
        self.seen = Latencies()
        self._last: dict[str, float] = {}

    def _on_batch(self, batch: OutputBatch) -> None:
        now = asyncio.get_running_loop().time()
        for output in batch.outputs:
            for _ in output.new_token_ids:
                if (last := self._last.get(output.request_id)) is not None:
                    self.seen.itl_s.append(now - last)
                self._last[output.request_id] = now
        super()._on_batch(batch)
