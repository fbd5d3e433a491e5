"""`bench simulator`: the same requests on `pd-serve serve` and on the simulated cluster.

For each layout of instances the real service gets a few rounds of requests over HTTP, in real time. Before
and after each round the steps of an engine in this process are measured (as by `pd-serve bench profile`)
while the service is idle, and before it a few requests one after the other. What such a request takes beyond
its steps is the cost of the front end. Then the simulated cluster gets the requests of each round, with the
step times and the front end of this round, in virtual time: machines change their speed from round to round.

The first step with a number of tokens takes longer on a CPU, as oneDNN compiles for it, which no cost model
has. So the service gets prompts of every length before the first round, and oneDNN keeps what it compiles.

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
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from loadtests.bench import simulated_side
from loadtests.bench.clients import run_checked_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.rounds import Round
from loadtests.bench.simulated_side import FrontEnd
from loadtests.latency_statistics import statistics_ms
from loadtests.outcome import Outcome, latencies_s
from loadtests.servers import MODEL, SharedSettings, free_port, running
from loadtests.terminal import new_progress, numbers_table
from pd_serve.profiling.engine_profile import measure, start_engine
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import Point, Row, StepSeen, points, relative_errors, rows, write_csv
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import CostModel, LinearCostModel
from pd_serve.simulation.config import TraceRequest

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

#: Targets: how far a ratio may be from 1.
MAX_ERROR = {"p50": 0.1, "p99": 0.2}

#: Requests in the batch at a time if no rate is given.
CONCURRENCY = 2

#: Names in reports of the latencies of `loadtests.outcome`, with their titles.
REPORTED = {"request": ("e2e", "request"), "ttft": ("ttft", "TTFT"), "itl": ("itl", "ITL")}
PARTS = ("mean", "p50", "p99")

Summary = dict[str, dict[str, float]]


async def run(report: BenchmarkReport, *, num_requests: int, rate: float | None, profile_s: float) -> None:
    """Measures, shows tables and writes the numbers. Takes about 17 minutes.

    Args:
        num_requests: Requests per round.
        rate: Requests/s; None for one that keeps `CONCURRENCY` requests in the batch, by the first measured
            steps.
        profile_s: Time to measure steps, per round.

    Raises:
        PdServeError: A server did not start, or a request failed.
    """
    environment = {
        "OMP_NUM_THREADS": str(num_threads(os.cpu_count() or 1)),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": KEPT_KERNELS,
        "LRU_CACHE_CAPACITY": KEPT_KERNELS,
    }
    os.environ.update(environment)
    layouts = []
    engines = {}
    for layers in LAYERS:
        flags = engine_flags(layers)
        with report.console.status("starting an engine to measure"):
            engine = await start_engine(MODEL, flags)
        engines[str(layers or "own")] = engine.about
        try:
            settings = SharedSettings(MODEL, flags, environment)
            bench = SimulatorBenchmark(engine, settings, num_requests, rate, profile_s, report.console)
            for layout in LAYOUTS:
                layouts.append({"layers": layers} | await bench.compare(layout))
                report.show(_table(layout, layouts[-1]))
        finally:
            await engine.close()
    workload = {
        "arrivals": "poisson",
        "requests": num_requests,
        "rounds": ROUNDS,
        "prompt_tokens": LENGTHS.prompt,
        "output_tokens": LENGTHS.output,
    }
    about = {"model": MODEL, "workload": workload, "engines": engines, "environment": environment}
    report.write(about | {"layouts": layouts})


def engine_flags(layers: int | None) -> list[str]:
    """Flags of an engine whose model has this many layers, with weights that are made up."""
    if layers is None:
        return []
    return ["--load-format=dummy", f"--hf-overrides={json.dumps({'num_hidden_layers': layers})}"]


@dataclass
class RealRound:
    """A round on the service, and what was measured around it."""

    load: Load
    alone: list[Outcome]
    measured: Round
    steps: list[Row]


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
        real = await self._real(layout)
        simulated: list[Outcome] = []
        fits, front_ends = [], []
        for seed, one in enumerate(real):
            model = _fitted(one.steps)
            alone = simulated_side.alone(ALONE.requests(seed))
            plain = await self._simulated(layout, model, alone, seed, FrontEnd())
            front_end = FrontEnd.measured(one.alone, plain)
            simulated += await self._simulated(layout, model, one.load.requests(seed), seed, front_end)
            fits.append(asdict(model) | {"relative_error": relative_errors(one.steps, model)})
            front_ends.append({name: round(1e3 * value, 3) for name, value in asdict(front_end).items()})
        rounds = [one.measured for one in real]
        real_ms, simulated_ms = summary([o for one in rounds for o in one.outcomes]), summary(simulated)
        return {
            "instances": layout,
            "rate": self.rate,
            "real_ms": real_ms,
            "simulated_ms": simulated_ms,
            "ratio": ratios(real_ms, simulated_ms),
            "front_end_ms": front_ends,
            "rounds_real_ms": [summary(one.outcomes) for one in rounds],
            "load_averages": [one.load_average for one in rounds],
            "cores_used": [round(one.cpu_s / one.seconds, 2) for one in rounds],
            "tokens_per_message": [_tokens_per_message(one.outcomes) for one in rounds],
            "fits": fits,
            "steps": [[asdict(row) for row in one.steps] for one in real],
        }

    async def _real(self, layout: dict[str, int]) -> list[RealRound]:
        """All rounds on a service of its own."""
        found = []
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
                found.append(RealRound(load, alone.outcomes, measured, rows(steps)))
        return found

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

    async def _simulated(
        self,
        layout: dict[str, int],
        model: LinearCostModel,
        requests: list[TraceRequest],
        seed: int,
        front_end: FrontEnd,
    ) -> list[Outcome]:
        engines = simulated_side.engines(self.engine.about, front_end.around(model))
        config = simulated_side.config(requests, layout, engines, seed, front_end.request_s)
        return await asyncio.to_thread(simulated_side.simulate, config)


def _tokens_per_message(outcomes: Sequence[Outcome]) -> float:
    """Above 1 where tokens arrived together because the server or the client was late."""
    return round(sum(one.tokens - 1 for one in outcomes) / sum(len(one.gaps_s) for one in outcomes), 3)


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


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """{"request", "ttft", "itl"} of {"mean", "p50", "p99"} in milliseconds."""
    times = latencies_s(outcomes)
    return {
        name: {part: value or 0.0 for part, value in statistics_ms(times[latency], PARTS).items()}
        for name, (latency, _) in REPORTED.items()
    }


def ratios(real: Summary, simulated: Summary) -> Summary:
    """Real ÷ simulated of two summaries."""
    return {
        name: {part: round(real[name][part] / simulated[name][part], 3) for part in PARTS}
        for name in REPORTED
    }


def missed(ratio: Summary) -> list[str]:
    """The latencies that are further from those of the service than the target."""
    return [
        f"{name} {part}"
        for name in REPORTED
        for part, error in MAX_ERROR.items()
        if not 1 - error <= ratio[name][part] <= 1 + error
    ]


def _table(layout: dict[str, int], result: dict[str, Any]) -> Table:
    title = ", ".join(f"{number} {role}" for role, number in layout.items())
    if result["layers"]:
        title += f", {result['layers']} layers"
    table = numbers_table(title, "ms", "", "real", "simulated", "ratio", labels=2)
    for name, (_, label) in REPORTED.items():
        for part in PARTS:
            real, simulated = (f"{result[side][name][part]:.1f}" for side in ("real_ms", "simulated_ms"))
            table.add_row(label, part, real, simulated, f"{result['ratio'][name][part]:.2f}")
        table.add_section()
    table.caption = "\n".join(
        [
            f"{result['rate']} requests/s; front end, ms: {result['front_end_ms']}",
            f"missed (p50 within 10 %, p99 within 20 %): {', '.join(missed(result['ratio'])) or 'nothing'}",
        ]
    )
    return table
