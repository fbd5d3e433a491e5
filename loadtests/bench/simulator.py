"""`bench simulator`: the same requests on `pd-serve serve` and on the simulated cluster.

For each layout of instances the real service gets a few rounds of requests over HTTP, in real time. Before
and after each round the steps of an engine in this process are measured (as by `pd-serve bench profile`)
while the service is idle, and before it a few requests one after the other. What such a request takes beyond
its steps is the cost of the front end. Then the simulated cluster gets the requests of each round, with the
step times and the front end of this round, in virtual time: machines change their speed from round to round.

The first step with a number of tokens takes longer on a CPU, as oneDNN compiles for it, which no cost model
has. So the service gets prompts of every length before the first round, and oneDNN keeps what it compiles.

The service with simulated engines (`simulated_service`) needs no such measurement.

The number of threads of every engine, the measured one too, leaves cores to the API server and the clients.
With as many threads as cores they would wait for each other whenever anything else runs, and a step would
take ten times as long: that is a property of the machine's load, which no cost model describes.
"""

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich.console

from loadtests.bench import simulated_service, simulated_side
from loadtests.bench.clients import run_checked_round
from loadtests.bench.fidelity import RealRound, compared, fidelity_table
from loadtests.bench.load import Lengths, Load
from loadtests.bench.report import BenchmarkReport
from loadtests.servers import MODEL, SharedSettings, free_port, running
from loadtests.terminal import new_progress
from pd_serve.profiling.engine_profile import measure, start_engine
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import Point, Row, StepSeen, points, relative_errors, rows, write_csv
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import CostModel, LinearCostModel

#: What computes in the service.
ENGINES = ("simulated", "vllm")

LAYOUTS: tuple[dict[str, int], ...] = ({"neutral": 1}, {"prefill": 1, "decode": 1})

#: Rounds per layout, each with a seed of its own; the numbers are over all their requests.
ROUNDS = 3

#: Pause before each round, so that the measured steps are not part of it.
SETTLE_S = 0.5

LENGTHS = Lengths(prompt=(16, 256), output=(16, 96))
WARM_UP = Load("warm-up", 20, LENGTHS, rate=10.0)

#: The largest prompt and batch of the measured steps: those of larger ones are of no use for these loads.
MOST_TOKENS, MOST_REQUESTS = 2 * LENGTHS.prompt[1], 16

#: Numbers of tokens of a step that the service has seen before the first round: two prompts and a batch.
SEEN_TOKENS = range(1, MOST_TOKENS + MOST_REQUESTS)

#: Kernels that oneDNN keeps: four for each of these numbers of tokens. Its default, 1,024, drops some before
#: they are used again.
KEPT_KERNELS = "4096"

#: Layers of the model; None for as many as it has. More take longer beside the work of the front end.
LAYERS: tuple[int | None, ...] = (None, 16)

ALONE = Load("alone", 15, LENGTHS, num_clients=1)

#: Requests in the batch at a time if no rate is given.
CONCURRENCY = 2


async def run(
    report: BenchmarkReport,
    *,
    num_requests: int,
    rate: float | None,
    profile_s: float,
    engines: Sequence[str] = ENGINES,
) -> None:
    """Measures, shows tables and writes the numbers. Takes about 17 minutes with vLLM's engines, and 6 with
    simulated ones.

    Args:
        num_requests: Requests per round.
        rate: Requests/s to vLLM's engines; None for one that keeps `CONCURRENCY` requests in the batch, by
            the first measured steps.
        profile_s: Time to measure steps, per round.
        engines: Those of the service, of `ENGINES`.

    Raises:
        PdServeError: A server did not start, or a request failed.
    """
    numbers: dict[str, Any] = {"requests": num_requests, "rounds": ROUNDS}
    if "simulated" in engines:
        numbers["simulated_engines"] = []
        for layout in simulated_service.LAYOUTS:
            found = await simulated_service.compare(layout, ROUNDS, num_requests, report.console)
            report.show(fidelity_table(found, f"simulated engines, {found['cost_model']}"))
            numbers["simulated_engines"].append(found)
    if "vllm" in engines:
        numbers |= await _vllm_engines(report, num_requests, rate, profile_s)
    report.write(numbers)


async def _vllm_engines(
    report: BenchmarkReport, num_requests: int, rate: float | None, profile_s: float
) -> dict[str, Any]:
    environment = {
        "OMP_NUM_THREADS": str(num_threads(os.cpu_count() or 1)),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": KEPT_KERNELS,
        "LRU_CACHE_CAPACITY": KEPT_KERNELS,
    }
    os.environ.update(environment)
    layouts = []
    measured = {}
    for layers in LAYERS:
        flags = engine_flags(layers)
        with report.console.status("starting an engine to measure"):
            engine = await start_engine(MODEL, flags)
        measured[str(layers or "own")] = engine.about
        try:
            settings = SharedSettings(MODEL, flags, environment)
            bench = SimulatorBenchmark(engine, settings, num_requests, rate, profile_s, report.console)
            for layout in LAYOUTS:
                found = await bench.compare(layout)
                report.show(fidelity_table(found, f"{layers or 'own'} layers"))
                layouts.append({"layers": layers} | found)
        finally:
            await engine.close()
    lengths = {"prompt_tokens": LENGTHS.prompt, "output_tokens": LENGTHS.output}
    about = {"model": MODEL, "lengths": lengths, "measured_engines": measured, "environment": environment}
    return about | {"layouts": layouts}


def engine_flags(layers: int | None) -> list[str]:
    """Flags of an engine whose model has this many layers, with weights that are made up."""
    if layers is None:
        return []
    return ["--load-format=dummy", f"--hf-overrides={json.dumps({'num_hidden_layers': layers})}"]


@dataclass
class SimulatorBenchmark:
    """The settings that all layouts share.

    Attributes:
        rate: Requests/s; set from the first measured steps if None.
    """

    engine: MeasuredEngine
    settings: SharedSettings
    num_requests: int
    rate: float | None
    profile_s: float
    console: rich.console.Console

    async def compare(self, layout: dict[str, int]) -> dict[str, Any]:
        """Numbers of one layout, real and simulated."""
        real, steps = await self._real(layout)
        found = await compared(
            layout, real, partial(simulated_side.engines, self.engine.about), simulated_side.NETWORK
        )
        fits = [
            asdict(one.model) | {"relative_error": relative_errors(measured, one.model)}
            for one, measured in zip(real, steps, strict=True)
        ]
        return found | {"fits": fits, "steps": [[asdict(row) for row in measured] for measured in steps]}

    async def _real(self, layout: dict[str, int]) -> tuple[list[RealRound], list[list[Row]]]:
        """All rounds on a service of its own, and the steps that were measured around each."""
        found, all_steps = [], []
        async with AsyncExitStack() as stack:
            with self.console.status("starting pd-serve"):
                server = await stack.enter_async_context(running(self.settings.ours(layout, free_port())))
            progress = stack.enter_context(new_progress(self.console))
            task = progress.add_task("steps, then requests", total=ROUNDS)
            await run_checked_round(server, WARM_UP, seed=ROUNDS)
            for tokens in SEEN_TOKENS:
                one = Load(f"{tokens} tokens", 1, Lengths.equal(tokens, 1), num_clients=1)
                await run_checked_round(server, one, seed=ROUNDS)
            for seed in range(ROUNDS):
                progress.update(task, completed=seed, refresh=True)
                steps = await self._steps()
                if self.rate is None:
                    self.rate = moderate_rate(_fitted(rows(steps)))
                load = Load("lengths", self.num_requests, LENGTHS, rate=self.rate)
                alone = await run_checked_round(server, ALONE, seed)
                await asyncio.sleep(SETTLE_S)
                measured = await run_checked_round(server, load, seed)
                for point, seen in (await self._steps()).items():
                    steps[point] += seen
                all_steps.append(rows(steps))
                model = _fitted(all_steps[-1])
                found.append(RealRound(load, measured, ALONE, alone.outcomes, model))
        return found, all_steps

    async def _steps(self) -> dict[Point, list[StepSeen]]:
        """The steps of the engine in this process, measured for half of a round's time."""
        wanted = [
            point
            for point in points(self.engine.limits)
            if point.tokens <= MOST_TOKENS and point.batch_size <= MOST_REQUESTS
        ]
        found = await measure(self.engine, wanted, self.profile_s / 2)
        await asyncio.sleep(SETTLE_S)
        return {point: list(seen) for point, seen in found.items()}


def _fitted(steps: list[Row]) -> LinearCostModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.csv"
        write_csv(path, steps)
        return cost_table.read(path)


def moderate_rate(model: CostModel) -> float:
    """Requests/s that keep about `CONCURRENCY` of them in the batch, to two digits."""
    prompt, output = (int(statistics.mean(limits)) for limits in (LENGTHS.prompt, LENGTHS.output))
    context = CONCURRENCY * (prompt + output // 2)
    alone_s = model.prefill_s([(prompt, 0)]) + output * model.decode_s(CONCURRENCY, context)
    return float(f"{CONCURRENCY / alone_s:.2g}")


def num_threads(num_cores: int) -> int:
    """Threads of an engine that leave cores to the API server and the clients, for the largest layout."""
    return max(1, num_cores // (max(sum(layout.values()) for layout in LAYOUTS) + 2))
