"""Which layout of GPUs serves the most requests/s within a target: `pd-serve plan`."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field

import numpy as np

from migration.child_process import spawned_pool
from pd_serve.errors import InvalidRequestError
from pd_serve.planning.fast_cluster import FastRun, Layout
from pd_serve.simulated_engine.hardware import Hardware
from pd_serve.simulation.config import TraceRequest
from router.slo import Slo

#: Token budgets of a step that aggregated layouts are tried with.
CHUNKS = (512, 1024, 2048, 4096, 8192)

#: Those of prefill instances. A request leaves one between two steps: large steps delay its second token.
PREFILL_CHUNKS = (2048, 8192)

#: Rates of the first search grow or shrink by this factor until one is within the target and one is not;
#: then the distance is halved this many times on a logarithmic scale.
GROWTH, HALVINGS = 1.6, 5

#: Share of a run that does not count, as the cluster is still empty.
WARM_UP = 0.2

#: A queue that grows has to show. So a run lasts at least this many times the bound on the first token, and
#: twice the life of a request that just meets the target; the workload is repeated for that, up to a number
#: of requests.
LEAST_TTFT, LEAST_LIVES, MOST_REQUESTS = 8, 2, 8000

#: Rates further apart than this factor from the first guess are not looked for.
FARTHEST = 1e4


@dataclass(frozen=True, slots=True)
class Goal:
    """What a layout is measured by.

    Attributes:
        attainment: Least share of the requests that have to meet the SLO.
    """

    slo: Slo
    attainment: float = 0.9


@dataclass(slots=True)
class LayoutPlan:
    """What a layout can do.

    Attributes:
        goodput: Greatest rate in requests/s at which the goal is met; 0 if it is at none.
        curve: (rate, attainment) of all runs, by rate. An attainment below the goal is an upper bound: the
            run ended as soon as the goal was missed.
        ttft_s, tpot_s: P99 at that rate.
        attainment: At the rate of the trace itself; None if it has none.
    """

    layout: Layout
    goodput: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float | None = None


def layouts_of(num_instances: int, hardware: Hardware) -> list[Layout]:
    """All layouts of that many instances: aggregated by chunk size, and every split of prefill and decode."""
    chunk = hardware.engine.chunk_tokens
    chunks = dict.fromkeys([*CHUNKS, chunk] if chunk else [*CHUNKS, None])
    # A batch has a token of each request in a step: with less than that no prompt would be computed.
    found = [Layout(neutral=num_instances, chunk_tokens=each) for each in chunks]
    return found + [
        Layout(prefill=prefill, decode=num_instances - prefill, chunk_tokens=each)
        for prefill in range(1, num_instances)
        for each in PREFILL_CHUNKS
    ]


def plan(
    workload: Sequence[TraceRequest],
    hardware: Hardware,
    num_gpus: int,
    goal: Goal,
    *,
    rate: float | None = None,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayoutPlan]:
    """Measures every layout; the best comes first.

    Args:
        workload: Its arrivals are stretched to each rate.
        rate: Requests/s of the trace itself, if it has a rate.
        jobs: Processes; by default one per core.
        on_progress: Called with (layouts measured, layouts).

    Raises:
        InvalidRequestError: The GPUs are too few for an instance, or no instance has room for a request.
    """
    num_instances, rest = divmod(num_gpus, hardware.num_gpus)
    if not num_instances or rest:
        raise InvalidRequestError(
            f"{num_gpus} GPUs: an instance of this cost model has {hardware.num_gpus}: give a multiple"
        )
    tasks = layouts_of(num_instances, hardware)
    found: list[LayoutPlan] = []
    arguments = (workload, hardware, goal, rate)
    count = min(jobs or os.cpu_count() or 1, len(tasks))
    for done, one in enumerate(_measured(tasks, arguments, count), 1):
        found.append(one)
        on_progress(done, len(tasks))
    order = {layout: place for place, layout in enumerate(tasks)}
    return sorted(found, key=lambda one: (-one.goodput, order[one.layout]))


def _measured(
    layouts: Sequence[Layout],
    arguments: tuple[Sequence[TraceRequest], Hardware, Goal, float | None],
    jobs: int,
) -> Iterable[LayoutPlan]:
    if jobs == 1:
        yield from (measure(layout, *arguments) for layout in layouts)
        return
    with spawned_pool(jobs) as pool:
        running = [pool.submit(measure, layout, *arguments) for layout in layouts]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def measure(
    layout: Layout,
    workload: Sequence[TraceRequest],
    hardware: Hardware,
    goal: Goal,
    rate: float | None = None,
) -> LayoutPlan:
    """Finds the greatest rate at which a layout meets the goal."""
    search = _Search(layout, workload, hardware, goal)
    found = LayoutPlan(layout)
    if rate is not None:
        found.attainment = search.run(rate, to_the_end=True).attainment
    low = high = first_guess(workload, hardware, layout)
    if search.is_met(low):
        while search.is_met(high * GROWTH) and high < FARTHEST * low:
            high *= GROWTH
        low, high = high, high * GROWTH
    else:
        while not search.is_met(low / GROWTH) and low > high / FARTHEST:
            low /= GROWTH
        low, high = low / GROWTH, low
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if search.is_met(middle) else (low, middle)
    found.curve = sorted(search.attained.items())
    if search.is_met(low):
        found.goodput = low
        run = search.run(low, to_the_end=True)
        found.ttft_s = float(np.percentile([r.ttft_s for r in run.requests], 99))
        found.tpot_s = float(np.percentile([r.tpot_s for r in run.requests], 99))
    return found


def first_guess(workload: Sequence[TraceRequest], hardware: Hardware, layout: Layout) -> float:
    """A rate near what the layout can serve: prompts one by one, decodes in batches that fill the memory."""
    engine = hardware.engine
    prompt = float(np.mean([r.prompt_tokens for r in workload]))
    output = float(np.mean([r.output_tokens for r in workload]))
    batch = max(1, min(int(engine.num_blocks * engine.block_tokens / (prompt + output)), engine.max_num_seqs))
    decode_s = output * engine.cost_model.decode_s(batch, int(batch * (prompt + output / 2))) / batch
    prefill_s = engine.cost_model.prefill_s([(int(prompt), 0)])
    if layout.is_disaggregated:
        return min(layout.prefill / prefill_s, layout.decode / decode_s) / 2
    return layout.neutral / (prefill_s + decode_s) / 2


class _Search:
    """Runs of one layout at several rates.

    Attributes:
        attained: Attainment by rate.
    """

    def __init__(
        self, layout: Layout, workload: Sequence[TraceRequest], hardware: Hardware, goal: Goal
    ) -> None:
        self.attained: dict[float, float] = {}
        self._layout, self._hardware, self._goal = layout, hardware, goal
        self._workload = workload
        span = workload[-1].arrival_s - workload[0].arrival_s
        self._rate = (len(workload) - 1) / span
        mean_output = sum(request.output_tokens for request in workload) / len(workload)
        life_s = goal.slo.ttft_s + mean_output * goal.slo.tpot_s
        self._least_s = LEAST_TTFT * goal.slo.ttft_s + LEAST_LIVES * life_s

    def run(self, rate: float, *, to_the_end: bool = False) -> FastRun:
        factor = self._rate / rate
        repeats = math.ceil(min(self._least_s * rate, MOST_REQUESTS) / len(self._workload))
        period_s = len(self._workload) / rate
        first_s = self._workload[0].arrival_s
        stretched = [
            _at(request, (request.arrival_s - first_s) * factor + repeat * period_s)
            for repeat in range(repeats)
            for request in self._workload
        ]
        warm_up = int(WARM_UP * len(stretched))
        most = float("inf") if to_the_end else (1 - self._goal.attainment) * (len(stretched) - warm_up)
        run = FastRun(self._hardware, self._layout, self._goal.slo, warm_up, most)
        run.run(stretched)
        self.attained[rate] = run.attainment
        return run

    def is_met(self, rate: float) -> bool:
        if rate not in self.attained:
            self.run(rate)
        return self.attained[rate] >= self._goal.attainment


def _at(request: TraceRequest, arrival_s: float) -> TraceRequest:
    return TraceRequest(arrival_s, request.prompt_tokens, request.output_tokens)
