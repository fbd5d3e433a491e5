"""`bench simulation-speed`: CPU time of the simulator per request, by cluster size and number of requests.

Each cluster is simulated twice with the same requests: with runs of steps as one event, and with an event per
step. The results have to be equal. Each simulation has a process of its own, so that its memory is its own.
"""

import asyncio
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from zlib import crc32

from loadtests.bench.report import BenchmarkReport
from loadtests.terminal import numbers_table
from migration.child_process import spawned_pool
from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario, configure
from pd_serve.simulation.simulate import simulate
from pd_serve.simulation.workloads import TraceSpec

#: The paper's workload M-M, close to the highest load that its cluster serves.
TRACE, RATE_PER_INSTANCE = "m-m", 0.45


@dataclass(frozen=True)
class SimulationCost:
    """What one simulation has taken.

    Attributes:
        cpu_s: CPU time, without the start of Python.
        simulated_s: Virtual time.
        memory_mib: Largest resident memory of its process.
        result: A checksum of all its figures.
    """

    instances: int
    requests: int
    every_step: bool
    cpu_s: float
    simulated_s: float
    steps: int
    memory_mib: float
    result: int

    @property
    def requests_per_cpu_s(self) -> float:
        return self.requests / self.cpu_s


async def run(report: BenchmarkReport, sizes: Sequence[int], requests_per_instance: int) -> None:
    """Measures, shows a table and writes the numbers.

    Raises:
        PdServeError: The two ways give different results.
    """
    table = numbers_table(
        f"simulations of {TRACE} at {RATE_PER_INSTANCE} requests/s per instance",
        *("instances", "requests", "event per", "CPU ms/request", "requests per CPU s", "memory MiB"),
    )
    costs: list[SimulationCost] = []
    for instances in sizes:
        pair = []
        for every_step in (False, True):
            with report.console.status(f"{instances} instances"):
                pair.append(await _in_process(instances, instances * requests_per_instance, every_step))
            cost = pair[-1]
            table.add_row(
                str(instances),
                str(cost.requests),
                "step" if every_step else "run",
                f"{1e3 / cost.requests_per_cpu_s:.2f}",
                f"{cost.requests_per_cpu_s:.0f}",
                f"{cost.memory_mib:.0f}",
            )
        costs += pair
        if pair[0].result != pair[1].result:
            raise PdServeError(f"{instances} instances: an event per run gives another result than per step")
    report.show(table)
    report.write({"simulations": [asdict(cost) for cost in costs]})


def measure(instances: int, requests: int, every_step: bool) -> SimulationCost:
    """Simulates one cluster in this process."""
    trace = TraceSpec(TRACE, RATE_PER_INSTANCE * instances, requests)
    config, _, _ = configure(Scenario(trace, "llumnix", {"neutral": instances}))
    began = time.process_time()
    result = simulate(replace(config, every_step=every_step))
    cpu_s = time.process_time() - began
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result.wall_s = 0.0
    return SimulationCost(
        instances,
        requests,
        every_step,
        round(cpu_s, 3),
        round(result.duration_s, 3),
        result.steps,
        round(memory_mib, 1),
        crc32(repr(result).encode()),
    )


async def _in_process(instances: int, requests: int, every_step: bool) -> SimulationCost:
    loop = asyncio.get_running_loop()
    with spawned_pool(1) as pool:
        return await loop.run_in_executor(pool, measure, instances, requests, every_step)
