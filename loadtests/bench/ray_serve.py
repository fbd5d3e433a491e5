"""`bench serve`: the cost of Ray Serve's Python proxy and of its HAProxy in front of an API server.

Each of the three services has one API server and one simulated engine, so that only the way to them differs.
"""

import asyncio
import os
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import rich.console
from rich.table import Table

from loadtests.bench.clients import run_checked_round
from loadtests.bench.overhead import closed_loop
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.rounds import RoundMedians
from loadtests.bench.simulated_server import simulated_server, write_step_table
from loadtests.ray_serve_service import deploy, head_command, new_environment, write_config
from loadtests.servers import MODEL, RunningServer, ServerCommand, free_port, running
from loadtests.terminal import numbers_table

ALONE, PROXY, HAPROXY = "pd-serve serve", "Serve, Python proxy", "Serve, HAProxy"

#: One client shows the cost of a token on its way; many show the throughput of a core.
LOADS = (closed_loop(1, 16, 64, 64), closed_loop(16, 64, 64, 64))
ROUNDS = 3

#: Duration of every step of the engine: short enough that the engine is not the limit.
STEP_MS = 5.0
SETTLE_S = 1.0

#: Builds the application.
IMPORT_PATH = "pd_serve.launch.ray_serve:build"


@asynccontextmanager
async def service(name: str) -> AsyncIterator[RunningServer]:
    """Runs one of the three services until the end of the block.

    Raises:
        PdServeError: It did not start.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        cost_model = write_step_table(Path(folder), STEP_MS)
        if name == ALONE:
            async with running(simulated_server(name, cost_model, port)) as server:
                yield server
            return
        dashboard, environment = free_port(), new_environment()
        arguments = {"model": MODEL, "neutral": 1, "engine": "simulated", "cost_model": str(cost_model)}
        config = write_config(Path(folder), port, arguments, IMPORT_PATH, haproxy=name == HAPROXY)
        deploying = asyncio.create_task(deploy(config, dashboard, environment))
        try:
            command = head_command(Path(folder), free_port(), dashboard)
            async with running(ServerCommand(name, command, port, environment)) as server:
                yield server
        finally:
            deploying.cancel()
            await asyncio.gather(deploying, return_exceptions=True)


async def run(report: BenchmarkReport) -> None:
    """Measures all three in turns, shows a table and writes the numbers. Takes about five minutes.

    Raises:
        PdServeError: A service did not start, or a request failed.
    """
    rounds, load_average = await _measure(report.console)
    result = summary(rounds)
    report.show(_table(result))
    numbers = {"loads": [asdict(load) for load in LOADS], "rounds": ROUNDS, "step_ms": STEP_MS}
    # Starting the services is load on the machine, and over by then: so beside the load average at the very
    # start.
    numbers |= {"load_average_when_measuring": {"begin": load_average, "end": os.getloadavg()}}
    every_round = {
        name: {clients: [asdict(one) for one in many] for clients, many in by_load.items()}
        for name, by_load in rounds.items()
    }
    report.write(numbers | {"medians": result, "all": every_round})


#: By service and number of clients.
Rounds = dict[str, dict[str, list[RoundMedians]]]


async def _measure(console: rich.console.Console) -> tuple[Rounds, tuple[float, float, float]]:
    """All rounds, and the machine's load average when all services were ready."""
    names = (ALONE, PROXY, HAPROXY)
    async with AsyncExitStack() as stack:
        console.print(f"starting: {'; '.join(names)}")
        starts = [stack.enter_async_context(service(name)) for name in names]
        servers = dict(zip(names, await asyncio.gather(*starts), strict=True))
        rounds: Rounds = {name: {load.name: [] for load in LOADS} for name in names}
        load_average = os.getloadavg()
        for number in range(-1, ROUNDS):  # the first one is a warm-up
            console.print(f"round {number + 1} of {ROUNDS}")
            for load in LOADS:
                for name, server in servers.items():
                    await asyncio.sleep(SETTLE_S)
                    measured = await run_checked_round(server, load, seed=number)
                    if number >= 0:
                        rounds[name][load.name].append(RoundMedians.of(measured))
    return rounds, load_average


def summary(rounds: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """Medians over the rounds, by service and number of clients."""
    return {
        name: {
            clients: {
                number: round(statistics.median(getattr(one, number) for one in many), 3)
                for number in RoundMedians.__dataclass_fields__
            }
            for clients, many in by_load.items()
        }
        for name, by_load in rounds.items()
    }


def _table(result: dict[str, dict[str, dict[str, float]]]) -> Table:
    title = f"medians of {ROUNDS} rounds, one API server, simulated engine"
    columns = ("in front", "clients", "tokens/s", "TTFT ms", "ITL ms", "CPU ms/token")
    table = numbers_table(title, *columns, labels=1)
    for name, by_clients in result.items():
        for clients, numbers in by_clients.items():
            table.add_row(
                name,
                clients,
                f"{numbers['output_tokens_per_s']:.0f}",
                f"{numbers['ttft_ms']:.1f}",
                f"{numbers['itl_ms']:.2f}",
                f"{numbers['cpu_ms_per_token']:.2f}",
            )
    return table
