"""One simulation as data: the arguments of `simulate run`; experiments are lists of these."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.hardware import hardware
from pd_serve.simulation.config import Moves, NetworkSettings, SimulationConfig
from pd_serve.simulation.result import SimulationResult
from pd_serve.simulation.simulate import simulate
from pd_serve.simulation.summary import series, summarize
from pd_serve.simulation.workloads import TraceSpec, fitting, make_requests
from router.policies import paper_threshold, policy_set
from router.priority import PriorityClass, priority_class
from router.scaling import PoolBounds
from router.slo import NO_SLO, Slo

Simulate = Callable[[SimulationConfig, Callable[[int, int], None] | None], SimulationResult]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload, a cluster and a policy. See `SimulationConfig` and `EngineSettings` for the other fields.

    Attributes:
        instances: Number at the start, by role.
        num_blocks, chunk_tokens: In the place of those of the cost model; 0 chunk tokens for none.
        autoscale: Bounds by role.
        one_class: Schedules all requests with normal priority, and reports them by the priority of the trace.
        with_series: Whether the summary has the cluster over time.
        slo: Bounds of a request that counts in the goodput.
        refuses: Requests bring these as targets; see `SimulationConfig.slo`.
        nodes, far_gb_per_s: Machines, and GB/s of copies between them; see `NetworkSettings`.
    """

    trace: TraceSpec
    policy: str
    instances: dict[str, int] = field(default_factory=lambda: {"neutral": 16})
    overrides: dict[str, float | int | str] = field(default_factory=dict)
    cost_model: str = "a10-llama-7b"
    num_blocks: int | None = None
    chunk_tokens: int | None = None
    prefix_caching: bool = False
    autoscale: dict[str, PoolBounds] = field(default_factory=dict)
    max_migrations: int = 64
    front_end_s: float = 0.0
    one_class: bool = False
    with_series: bool = False
    slo: Slo = field(default_factory=Slo)
    refuses: bool = False
    moves: Moves = "live"
    nodes: int = 1
    far_gb_per_s: float = 0.0

    @property
    def key(self) -> str:
        """A hash of all fields, equal in every process."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        trace = self.trace
        at = f" at {trace.rate:g}/s" if trace.rate else ""
        arrivals = f" {trace.arrivals}," if trace.arrivals else ""
        return f"{self.policy} on {trace.name}{at},{arrivals} seed {trace.seed}"


def configure(
    case: Scenario, traces: Path | None = None
) -> tuple[SimulationConfig, list[PriorityClass], int]:
    """Configures the simulation of a case.

    Returns:
        The configuration, the priority class under which each request is reported, and the number of requests
        left out because no instance has enough KV blocks for them.

    Raises:
        InvalidRequestError: A field of the case is invalid.
    """
    overrides = dict(case.overrides)
    if case.policy == "llumnix-paper":
        overrides.setdefault("migration_threshold", paper_threshold(case.trace.name.upper()))
    try:
        policy_set(case.policy, **overrides)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    machine = hardware(case.cost_model)
    chunk_tokens = machine.engine.chunk_tokens if case.chunk_tokens is None else case.chunk_tokens or None
    engine = replace(
        machine.engine,
        num_blocks=case.num_blocks or machine.engine.num_blocks,
        chunk_tokens=chunk_tokens,
        prefix_caching=case.prefix_caching,
    )
    wanted = make_requests(case.trace, traces)
    room = int(engine.num_blocks * (1 - engine.watermark)) * engine.block_tokens
    requests = fitting(wanted, room)
    left_out = len(wanted) - len(requests)
    classes = [priority_class(request.priority) for request in requests]
    if case.one_class:
        requests = [msgspec.structs.replace(request, priority=0) for request in requests]
    config = SimulationConfig(
        requests=requests,
        instances=case.instances,
        policy=case.policy,
        engines={"neutral": engine},
        overrides=overrides,
        network=NetworkSettings(
            kv_latency_s=machine.kv_latency_s,
            kv_bytes_per_s=machine.kv_bytes_per_s,
            nodes=case.nodes,
            far_kv_bytes_per_s=case.far_gb_per_s * 1e9,
        ),
        autoscale=case.autoscale,
        start_instance_s=machine.start_s,
        max_migrations=case.max_migrations,
        moves=case.moves,
        front_end_s=case.front_end_s,
        slo=case.slo if case.refuses else NO_SLO,
        seed=case.trace.seed,
    )
    return config, classes, left_out


def run_scenario(
    case: Scenario,
    traces: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    simulate: Simulate = simulate,
) -> dict[str, Any]:
    """Runs a case and returns its summary; see `summary.summarize`.

    Args:
        simulate: Replaces the simulation, for tests.

    Raises:
        InvalidRequestError: A field of the case is invalid.
    """
    config, classes, left_out = configure(case, traces)
    assumed = hardware(case.cost_model).unknown
    with _quiet():
        result = simulate(config, on_progress)
    summary = summarize(result, case.slo, classes)
    summary |= {"seed": case.trace.seed, "left_out": left_out, "assumed": assumed, "config": asdict(case)}
    if case.with_series:
        summary["series"] = series(result)
    return summary


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables warnings of the control plane, such as the end of an instance."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
