"""`bench simulator`: the same requests on `pd-serve serve` and on the simulated cluster.

For each layout of instances the real service gets a few rounds of requests over HTTP, in real time. Before
each round the steps of an engine in this process are measured (as by `pd-serve bench profile`) while the
service is idle, and then a few requests one after the other, so that both sides see the machine in the same
state. What such a request takes beyond its steps is the cost of the front end. Then the simulated cluster
gets the requests of the rounds, with these step times and this front end, in virtual time.

The number of threads of every engine, the measured one too, leaves cores to the API server and the clients.
With as many threads as cores they would wait for each other whenever anything else runs, and a step would
take ten times as long: that is a property of the machine's load, which no cost model describes.
"""

import asyncio
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
    """Measures, shows tables and writes the numbers. Takes about four minutes.

    Args:
        num_requests: Requests per round.
        rate: Requests/s; None for one that keeps `CONCURRENCY` requests in the batch, by the first measured
            steps.
        profile_s: Time to measure steps, per round.

    Raises:
        PdServeError: A server did not start, or a request failed.
    """
    environment = {"OMP_NUM_THREADS": str(num_threads(os.cpu_count() or 1))}
    os.environ.update(environment)
    layouts = []
    with report.console.status("starting an engine to measure"):
        engine = await start_engine(MODEL, [])
    about_engine = engine.about
    try:
        bench = SimulatorBenchmark(engine, num_requests, rate, profile_s, environment, report.console)
        for layout in LAYOUTS:
            layouts.append(await bench.compare(layout))
            report.show(_table(layout, layouts[-1]))
    finally:
        await engine.close()
    workload = {
        "arrivals": "poisson",
        "rate": bench.rate,
        "requests": num_requests,
        "rounds": ROUNDS,
        "prompt_tokens": LENGTHS.prompt,
        "output_tokens": LENGTHS.output,
    }
    about = {"model": MODEL, "workload": workload, "engine": about_engine, "environment": environment}
    report.write(about | {"layouts": layouts})


@dataclass
class SimulatorBenchmark:
    """The settings that all layouts share.

    Attributes:
        rate: Requests/s; set from the first measured steps if None.
    """

    engine: MeasuredEngine
    num_requests: int
    rate: float | None
    profile_s: float
    environment: dict[str, str]
    console: rich.console.Console

    async def compare(self, layout: dict[str, int]) -> dict[str, Any]:
        """Numbers of one layout, real and simulated."""
        wanted = points(self.engine.limits)
        steps: dict[Point, list[StepSeen]] = {point: [] for point in wanted}
        loads: list[Load] = []
        rounds: list[Round] = []
        real_alone: list[Outcome] = []
        async with AsyncExitStack() as stack:
            with self.console.status("starting pd-serve"):
                command = SharedSettings(MODEL, [], self.environment).ours(layout, free_port())
                server = await stack.enter_async_context(running(command))
            await run_checked_round(server, WARM_UP, seed=ROUNDS)
            progress = stack.enter_context(new_progress(self.console))
            task = progress.add_task("steps, then requests", total=ROUNDS)
            for seed in range(ROUNDS):
                progress.update(task, completed=seed, refresh=True)
                for point, found in (await measure(self.engine, wanted, self.profile_s)).items():
                    steps[point] += found
                if self.rate is None:
                    self.rate = moderate_rate(_fitted(rows(steps)))
                    self.console.print(f"rounds of {self.num_requests} requests at {self.rate:g}/s")
                loads.append(Load("lengths", self.num_requests, LENGTHS, rate=self.rate))
                await asyncio.sleep(SETTLE_S)
                real_alone += (await run_checked_round(server, ALONE, seed)).outcomes
                await asyncio.sleep(SETTLE_S)
                rounds.append(await run_checked_round(server, loads[-1], seed))
        model = _fitted(rows(steps))
        alone = [simulated_side.alone(ALONE.requests(seed)) for seed in range(ROUNDS)]
        front_end = FrontEnd.measured(real_alone, await self._simulated(layout, model, alone, FrontEnd()))
        workloads = [load.requests(seed) for seed, load in enumerate(loads)]
        simulated = await self._simulated(layout, model, workloads, front_end)
        real_ms = summary([outcome for one in rounds for outcome in one.outcomes])
        simulated_ms = summary(simulated)
        return {
            "instances": layout,
            "real_ms": real_ms,
            "simulated_ms": simulated_ms,
            "ratio": ratios(real_ms, simulated_ms),
            "front_end_ms": {
                "request": round(front_end.request_s * 1e3, 3),
                "step": round(front_end.step_s * 1e3, 3),
            },
            "rounds_real_ms": [summary(one.outcomes) for one in rounds],
            "load_averages": [one.load_average for one in rounds],
            "cores_used": [round(one.cpu_s / one.seconds, 2) for one in rounds],
            "tokens_per_message": [_tokens_per_message(one.outcomes) for one in rounds],
            "fit": asdict(model),
            "relative_error": relative_errors(rows(steps), model),
            "steps": [asdict(row) for row in rows(steps)],
        }

    async def _simulated(
        self,
        layout: dict[str, int],
        model: LinearCostModel,
        workloads: list[list[TraceRequest]],
        front_end: FrontEnd,
    ) -> list[Outcome]:
        """The outcomes of all rounds, one after the other."""
        engines = simulated_side.engines(self.engine.about, front_end.around(model))
        outcomes: list[Outcome] = []
        for seed, requests in enumerate(workloads):
            config = simulated_side.config(requests, layout, engines, seed, front_end.request_s)
            outcomes += await asyncio.to_thread(simulated_side.simulate, config)
        return outcomes


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
    table = numbers_table(title, "ms", "", "real", "simulated", "ratio", labels=2)
    for name, (_, label) in REPORTED.items():
        for part in PARTS:
            real, simulated = (f"{result[side][name][part]:.1f}" for side in ("real_ms", "simulated_ms"))
            table.add_row(label, part, real, simulated, f"{result['ratio'][name][part]:.2f}")
        table.add_section()
    table.caption = "\n".join(
        [
            f"front end: {result['front_end_ms']}",
            f"missed (p50 within 10 %, p99 within 20 %): {', '.join(missed(result['ratio'])) or 'nothing'}",
        ]
    )
    return table
