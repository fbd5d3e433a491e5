"""The simulated side of `bench simulator`: instances like the real ones, in virtual time."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from loadtests.outcome import Outcome
from pd_serve.config import DEFAULT_POLICY
from pd_serve.errors import PdServeError
from pd_serve.platform.cpu import CPU_PREFILL_CHUNK_TOKENS, CPU_STAGE_BYTES_PER_S, is_cpu_build
from pd_serve.simulated_engine.cost_model import CostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, SimulationConfig, TraceRequest
from pd_serve.simulation.simulate import Simulation
from pd_serve.simulation.virtual_time import VirtualLoop


def engines(about: dict[str, int], model: CostModel) -> dict[str, EngineSettings]:
    """Simulated engines by role, like the instances of `pd-serve serve`.

    Args:
        about: Settings of the real engine; see `MeasuredEngine.about`.
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


def simulate(wanted: SimulationConfig) -> list[Outcome]:
    """Runs a simulation in an event loop of its own; not to be called in a thread that runs one.

    Raises:
        PdServeError: A request failed, or the cluster violates an invariant at the end.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_run(wanted))


async def _run(wanted: SimulationConfig) -> list[Outcome]:
    simulation = _SimulationWithGaps(wanted)
    result = await simulation.run()
    failed = sum(bool(r.failed or r.lost or r.duplicated or r.wrong) for r in result.records)
    problems = [*([f"{failed} requests have failed"] if failed else []), *result.integrity]
    if problems:
        raise PdServeError(f"the simulation is wrong: {problems[0]}")
    return [
        Outcome(
            number=number,
            tokens=record.tokens,
            ttft_s=record.prefill_s,
            gaps_s=simulation.gaps_s[number],
            e2e_s=record.request_s,
            at_s=record.request.arrival_s,
            prompt_tokens=record.request.prompt_tokens,
        )
        for number, record in enumerate(result.records)
    ]


class _SimulationWithGaps(Simulation):
    """Keeps every gap between two tokens; the simulation itself keeps only the longest of each request.

    Attributes:
        gaps_s: By number of the request.
    """

    def __init__(self, wanted: SimulationConfig) -> None:
        super().__init__(wanted)
        self.gaps_s: list[list[float]] = [[] for _ in wanted.requests]
        self._last: dict[int, float] = {}

    def _on_tokens(self, number: int, times: list[float]) -> None:
        for at in times:
            if (last := self._last.get(number)) is not None:
                self.gaps_s[number].append(at - last)
            self._last[number] = at
        super()._on_tokens(number, times)
