"""`pd-serve bench simulator`: the same requests on `pd-serve serve` and on the simulated cluster.

For each layout of instances the real service gets a few rounds of requests over HTTP, in real time. Before
each round the steps of an engine in this process are measured (as by `pd-serve bench profile`) while the
service has nothing to do, so that a machine with moods shows the same ones to both. Then the same requests
go to the simulated cluster with these step times, in virtual time.

Every engine, the measured one too, computes with so many threads that the front end and the clients have
cores left. With as many threads as cores they would wait for each other whenever anything else runs, and a
step take ten times as long: that is a property of the machine's load, and in no cost model.
"""

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.bench import virtual, workload
from loadtests.bench.real import Cluster, Observed, observe
from loadtests.bench.servers import MODEL, OURS, running
from loadtests.bench.workload import FIGURES, PARTS, Latencies
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on_sigterm
from pd_serve.observe import provenance as report
from pd_serve.profiling.engine_profile import measure, start_engine
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import Point, Row, StepSeen, points, relative_errors, rows, write_csv
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulation.config import TraceRequest

LAYOUTS: tuple[dict[str, int], ...] = ({"neutral": 1}, {"prefill": 1, "decode": 1})

#: Of each layout: as many workloads, with seeds of their own, for figures over all their requests.
ROUNDS = 3

#: Between two of them, so that the end of one is not part of the next.
SETTLE_S = 0.5

WARM_UP_REQUESTS = 20

NAMES = {"request": "request", "ttft": "TTFT", "itl": "ITL"}


async def run(
    json_path: Path | None = None,
    *,
    num_requests: int = 100,
    rate: float | None = None,
    profile_s: float = 12.0,
) -> None:
    """Measures, shows tables and writes the numbers. About four minutes.

    Args:
        num_requests: Per round.
        rate: Requests/s; None for one that keeps a few requests in the batch, by the steps measured first.
        profile_s: Time to measure steps, per round.

    Raises:
        PdServeError: A server did not come up, a request failed, or the benchmark was stopped.
    """
    end_on_sigterm()
    provenance = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    environment = {"OMP_NUM_THREADS": str(threads(os.cpu_count() or 1))}
    os.environ.update(environment)
    results = []
    with console.status("starting an engine to measure"):
        engine = await start_engine(MODEL, [])
    about_engine = engine.about
    try:
        bench = Bench(engine, num_requests, rate, profile_s, environment, console)
        for layout in LAYOUTS:
            results.append(await bench.compare(layout))
            console.print(table(layout, results[-1]))
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: nothing was written") from None
    finally:
        await engine.close()
    if json_path is not None:
        about = {
            "model": MODEL,
            "workload": {
                "arrivals": "poisson",
                "rate": bench.rate,
                "requests": num_requests,
                "rounds": ROUNDS,
                "prompt_tokens": workload.PROMPT_TOKENS,
                "output_tokens": workload.OUTPUT_TOKENS,
            },
            "engine": about_engine,
            "environment": environment,
            "layouts": results,
        }
        report.write(json_path, about | provenance)
        console.print(f"written to {json_path}")


class Bench:
    """What all layouts share.

    Attributes:
        rate: Requests/s; found by the first steps measured if it was not given.
    """

    def __init__(
        self,
        engine: MeasuredEngine,
        num_requests: int,
        rate: float | None,
        profile_s: float,
        environment: dict[str, str],
        console: rich.console.Console,
    ) -> None:
        self.rate = rate
        self._engine = engine
        self._num_requests = num_requests
        self._profile_s = profile_s
        self._environment = environment
        self._console = console

    async def compare(self, layout: dict[str, int]) -> dict[str, Any]:
        """One layout, real and simulated."""
        wanted = points(self._engine.limits)
        steps: dict[Point, list[StepSeen]] = {point: [] for point in wanted}
        rounds: list[list[TraceRequest]] = []
        observed: list[Observed] = []
        load_averages = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        async with AsyncExitStack() as stack:
            with self._console.status("starting pd-serve"):
                cluster = Cluster(MODEL, [], self._environment, layout)
                server = await stack.enter_async_context(running(OURS, cluster))
            await observe(server, workload.make(WARM_UP_REQUESTS, 10.0, seed=ROUNDS), seed=ROUNDS)
            # Drawn between rounds only: it must not compete with what is measured.
            progress = stack.enter_context(
                Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            )
            task = progress.add_task("steps, then requests", total=ROUNDS)
            for seed in range(ROUNDS):
                progress.update(task, completed=seed, refresh=True)
                for point, found in (await measure(self._engine, wanted, self._profile_s)).items():
                    steps[point] += found
                if self.rate is None:
                    self.rate = workload.moderate_rate(_fitted(rows(steps)))
                    self._console.print(f"rounds of {self._num_requests} requests at {self.rate:g}/s")
                rounds.append(workload.make(self._num_requests, self.rate, seed))
                await asyncio.sleep(SETTLE_S)
                load_averages.append(os.getloadavg()[0])
                observed.append(await observe(server, rounds[-1], seed))
        model = _fitted(rows(steps))
        real, simulated = Latencies(), Latencies()
        by_role = virtual.engines(self._engine.about, model)
        for seed, requests in enumerate(rounds):
            real.add(observed[seed].latencies)
            config = virtual.config(requests, layout, by_role, seed)
            simulated.add(await asyncio.to_thread(virtual.simulated, config))
        seen, expected = workload.summary(real), workload.summary(simulated)
        return {
            "instances": layout,
            "real_ms": seen,
            "simulated_ms": expected,
            "ratio": workload.ratios(seen, expected),
            "rounds_real_ms": [workload.summary(one.latencies) for one in observed],
            "load_averages": load_averages,
            "cores_used": [one.cores for one in observed],
            "tokens_per_message": [one.tokens_per_message for one in observed],
            "fit": asdict(model),
            "relative_error": relative_errors(rows(steps), model),
            "steps": [asdict(row) for row in rows(steps)],
        }


def _fitted(steps: list[Row]) -> LinearCostModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.csv"
        write_csv(path, steps)
        return cost_table.read(path)


def threads(num_cores: int) -> int:
    """Of an engine, if the largest layout, the front end and the clients are to share the cores."""
    return max(1, num_cores // (max(sum(layout.values()) for layout in LAYOUTS) + 2))


def title(layout: dict[str, int]) -> str:
    """{"prefill": 1, "decode": 1} → "1 prefill, 1 decode"."""
    return ", ".join(f"{number} {role}" for role, number in layout.items())


def table(layout: dict[str, int], result: dict[str, Any]) -> Table:
    """Real and simulated side by side."""
    shown = Table("ms", "", title=title(layout), title_justify="left")
    for column in ("real", "simulated", "ratio"):
        shown.add_column(column, justify="right")
    for name in FIGURES:
        for part in PARTS:
            real, simulated = (f"{result[side][name][part]:.1f}" for side in ("real_ms", "simulated_ms"))
            shown.add_row(NAMES[name], part, real, simulated, f"{result['ratio'][name][part]:.2f}")
        shown.add_section()
    return shown
