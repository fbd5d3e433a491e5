"""The simulated side of `bench simulator`: instances like the real ones, in virtual time."""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from loadtests.outcome import Outcome
from pd_serve.config import DEFAULT_POLICY
from pd_serve.errors import PdServeError
from pd_serve.platform.cpu import CPU_PREFILL_CHUNK_TOKENS, CPU_STAGE_BYTES_PER_S, is_cpu_build
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, SimulationConfig, TraceRequest
from pd_serve.simulation.simulate import Simulation
from pd_serve.simulation.virtual_time import VirtualLoop

#: Between instances whose engines compute on the cores of one machine.
NETWORK = NetworkSettings(kv_latency_s=0.001, kv_bytes_per_s=CPU_STAGE_BYTES_PER_S)

#: Time between requests of which each is alone, in seconds.
ALONE_S = 5.0


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What the service takes beside the engine's steps, in seconds.

    Attributes:
        request_s: For each request, before its first step.
        step_s: For each step: messages, and the work of the instance between two steps.
    """

    request_s: float = 0.0
    step_s: float = 0.0

    @classmethod
    def measured(cls, real: Sequence[Outcome], simulated: Sequence[Outcome]) -> "FrontEnd":
        """The difference of two medians, of requests that are alone in the service and in the simulation."""
        step_s = max(_median_gap_s(real) - _median_gap_s(simulated), 0.0)
        request_s = _median_ttft_s(real) - _median_ttft_s(simulated) - step_s
        return cls(max(request_s, 0.0), step_s)

    def around(self, model: LinearCostModel) -> LinearCostModel:
        """The durations of steps with what the instance takes for each."""
        added_ms = self.step_s * 1e3
        prefill, decode, mixed = model.prefill_ms, model.decode_ms, model.mixed_ms
        return LinearCostModel(
            (prefill[0] + added_ms, *prefill[1:]),
            (decode[0] + added_ms, *decode[1:]),
            None if mixed is None else mixed + added_ms,
        )


def _median_gap_s(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(gap for outcome in outcomes for gap in outcome.gaps_s)


def _median_ttft_s(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.ttft_s or 0.0 for outcome in outcomes)


def alone(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The requests, each after the end of the last one."""
    return [structs.replace(request, arrival_s=number * ALONE_S) for number, request in enumerate(requests)]


def engines(about: dict[str, int], model: LinearCostModel) -> dict[str, EngineSettings]:
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
    by_role: Mapping[str, EngineSettings],
    network: NetworkSettings,
    seed: int,
    front_end_s: float = 0.0,
) -> SimulationConfig:
    """A cluster with the policies of `pd-serve serve`."""
    return SimulationConfig(
        requests,
        instances,
        DEFAULT_POLICY,
        dict(by_role),
        network=network,
        front_end_s=front_end_s,
        seed=seed,
    )


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
