"""What stands in front of an API server, and what that costs: nothing, Serve's proxy, Serve's HAProxy.

Each has one API server and one simulated engine of its own, so that what differs is the way to them.
"""

import asyncio
import json
import os
import secrets
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import rich.console
from rich.table import Table

from loadtests.bench.overhead import Load, Measured, put_load
from loadtests.bench.router_cost import step_table
from loadtests.bench.servers import MODEL, Server, free_port, started
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on_sigterm
from pd_serve.observe import provenance as report
from pd_serve.platform.environment import LOOPBACK

PLAIN, PROXY, HAPROXY = "pd-serve serve", "Serve, Python proxy", "Serve, HAProxy"

#: One client alone shows what a token costs on its way; many, what a core can carry.
LOADS = (Load(1, 16, 64, 64), Load(16, 64, 64, 64))
ROUNDS = 3

#: An engine that is fast enough not to be what limits: every step takes so long.
STEP_MS = 5.0
SETTLE_S = 1.0

ENVIRONMENT = {
    **LOOPBACK,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_niceness": "0",  # as under `pd-serve serve`
}


@asynccontextmanager
async def serving(name: str) -> AsyncIterator[Server]:
    """One of the three, ended on leaving. Raises: PdServeError: it did not come up."""
    port = free_port()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        cost_model = _cost_model(Path(folder))
        if name == PLAIN:
            flags = ["--engine=simulated", f"--cost-model={cost_model}", "--neutral=1", f"--port={port}"]
            async with started(name, [_script("pd-serve"), "serve", MODEL, *flags], port, log, {}) as server:
                yield server
            return
        dashboard, head = free_port(), _head(Path(folder))
        environment = ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        config = _config(Path(folder), port, cost_model, haproxy=name == HAPROXY)
        deploying = asyncio.create_task(_deploy(config, dashboard, environment))
        try:
            command = [*head, f"--dashboard-port={dashboard}"]
            async with started(name, command, port, log, environment) as server:
                yield server
        finally:
            deploying.cancel()
            await asyncio.gather(deploying, return_exceptions=True)


def _head(folder: Path) -> list[str]:
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "num-cpus": 4,
        "object-store-memory": 80 * 2**20,
        "temp-dir": folder,
    }
    return [_script("ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]


def _cost_model(folder: Path) -> Path:
    """Of equal steps, whatever is in them."""
    path = folder / "steps.csv"
    path.write_text(step_table(STEP_MS))
    return path


def _config(folder: Path, port: int, cost_model: Path, *, haproxy: bool) -> Path:
    """As deploy/serve.yaml, with one API server and one simulated engine."""
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}
    application = {
        "name": "bench",
        "route_prefix": "/",
        "import_path": "pd_serve.launch.ray_serve:build",
        "args": {"model": MODEL, "neutral": 1, "engine": "simulated", "cost_model": str(cost_model)},
    }
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "controller_options": {"runtime_env": {"env_vars": variables}},
        "applications": [application],
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(config))  # which is YAML, too
    return path


async def _deploy(config: Path, dashboard: int, environment: dict[str, str]) -> None:
    """Tries until Ray answers; cancelled with its server."""
    command = [_script("serve"), "deploy", str(config), "--address", f"http://127.0.0.1:{dashboard}"]
    while True:
        await asyncio.sleep(1)
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | environment,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        if await process.wait() == 0:
            return


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


async def run(json_path: Path | None) -> None:
    """Measures all three in turns, shows a table, writes JSON. About five minutes on two cores.

    Raises:
        PdServeError: One did not come up, a request failed, or the benchmark was stopped.
    """
    end_on_sigterm()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    provenance = report.provenance()
    try:
        rounds, load_average = await _measure(console)
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: nothing was written") from None
    result = summary(rounds)
    console.print(_table(result))
    if json_path is not None:
        about = {"loads": [asdict(load) for load in LOADS], "rounds": ROUNDS, "step_ms": STEP_MS}
        # Beside what it was at the very start: starting the servers is load, and over by then.
        about |= {"load_average_when_measuring": {"begin": load_average, "end": os.getloadavg()}}
        raw = {
            name: {str(load.num_clients): [asdict(one) for one in many] for load, many in by_load.items()}
            for name, by_load in rounds.items()
        }
        report.write(json_path, provenance | about | {"medians": result, "all": raw})
        console.print(f"written to {json_path}")


async def _measure(
    console: rich.console.Console,
) -> tuple[dict[str, dict[Load, list[Measured]]], tuple[float, float, float]]:
    """All rounds by what stands in front, and the machine's load when all had started."""
    async with AsyncExitStack() as stack:
        names = (PLAIN, PROXY, HAPROXY)
        console.print(f"starting: {'; '.join(names)}")
        started_ones = [stack.enter_async_context(serving(name)) for name in names]
        servers = dict(zip(names, await asyncio.gather(*started_ones), strict=True))
        rounds: dict[str, dict[Load, list[Measured]]] = {name: {load: [] for load in LOADS} for name in names}
        load_average = os.getloadavg()
        for number in range(-1, ROUNDS):  # the first one is to warm up
            console.print(f"round {number + 1} of {ROUNDS}")
            for load in LOADS:
                for name, server in servers.items():
                    await asyncio.sleep(SETTLE_S)
                    measured = await put_load(server, load, seed=number)
                    if number >= 0:
                        rounds[name][load].append(measured)
    return rounds, load_average


def summary(rounds: dict[str, dict[Load, list[Measured]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians over the rounds, by what stands in front and the number of clients."""
    return {
        name: {
            str(load.num_clients): {
                figure: round(statistics.median(getattr(one, figure) for one in many), 3)
                for figure in Measured.__dataclass_fields__
            }
            for load, many in by_load.items()
        }
        for name, by_load in rounds.items()
    }


def _table(result: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=f"medians of {ROUNDS} rounds, one API server, simulated engine")
    for column in ("in front", "clients", "tokens/s", "TTFT ms", "ITL ms", "CPU ms/token"):
        table.add_column(column, justify="right")
    for name, by_clients in result.items():
        for clients, figures in by_clients.items():
            table.add_row(
                name,
                clients,
                f"{figures['output_tokens_per_s']:.0f}",
                f"{figures['ttft_ms']:.1f}",
                f"{figures['itl_ms']:.2f}",
                f"{figures['cpu_ms_per_token']:.2f}",
            )
    return table
