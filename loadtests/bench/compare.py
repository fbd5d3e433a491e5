"""`pd-serve bench compare`: ours beside plain vLLM and vLLM's own disaggregation, here, in one run.

For each number of engines the same load goes to each arm (`loadtests.bench.arms`) in turn, another one first
in every round, so that the machine's moods hit all. An arm's processes live for its turn only: engines with
a NixlConnector keep a core each busy while they are idle. Before that, the routers alone
(`loadtests.bench.router_cost`).
"""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.bench import compare_tables, router_cost
from loadtests.bench.arms import PLAIN, TITLES, Arm, Peers, arms, shown
from loadtests.bench.clients import put_load
from loadtests.bench.seen import Load, Round, figures, ratios
from loadtests.bench.servers import Server, Settings, free_port, several
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on_sigterm
from pd_serve.observe import provenance as report

WARM_UP = Load("warm-up", 8, num_clients=4)

#: Before each load an arm has as long to come to rest, which is below so many busy cores.
REST_S, REST_CORES = 15.0, 0.25

#: Equal everywhere: a cache that is scarce, as on a GPU with a real model (8,160 tokens), and prompts in
#: chunks as ours computes them on a CPU, which is also what keeps a plain engine's decoding going.
ENGINE = {"kv_cache_memory_bytes": 32 * 2**20, "max_model_len": 4096, "max_num_batched_tokens": 512}

#: Of one arm's processes, by number of engines: measured, rounded up.
ARM_BYTES, ENGINE_BYTES = 600 * 2**20, 900 * 2**20

SETUP = Path(__file__).parents[2] / "deploy" / "setup_peers.sh"


async def run(
    json_path: Path | None,
    *,
    sizes: Sequence[int],
    rounds: int,
    rate: float,
    num_requests: int,
) -> None:
    """Measures, shows tables and writes the numbers after each. About ten minutes for each size.

    Args:
        sizes: Numbers of engines, each at least two.
        rounds: Of each size; every arm has one turn at each load in each.
        rate: Requests/s of the open loop.
        num_requests: Of each load in each round.

    Raises:
        PdServeError: The peers could not be installed, a process did not come up, memory is short, or the
            benchmark was stopped.
    """
    end_on_sigterm()
    about = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # of the tables, in a log
    peers = Peers(await installed(console), free_port)
    about["versions"] |= versions()
    loads = [Load("steady", num_requests, rate=rate), Load("full", num_requests, num_clients=16)]
    about |= {"loads": [asdict(load) for load in loads], "engine": ENGINE, "sizes": {}}

    def keep(table: Table) -> None:
        console.print(table)
        if json_path is not None:
            report.write(json_path, about)
            console.print(f"written to {json_path}")

    try:
        about["routers"] = await router_cost.run(peers, console)
        keep(compare_tables.routers(about["routers"]))
        for size in sizes:
            about["sizes"][str(size)] = await _size(size, loads, rounds, peers, console)
            keep(compare_tables.arms(size, about["sizes"][str(size)]))
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: what was not shown was not measured") from None


async def installed(console: rich.console.Console) -> Path:
    """The folder of the peers' environment, made if need be.

    Raises:
        PdServeError: Its script has failed, or is not here.
    """
    if not SETUP.is_file():
        raise PdServeError("the peers are installed by deploy/setup_peers.sh, which comes with the sources")
    with console.status("installing vllm-router and sglang-router"):
        made = await asyncio.to_thread(subprocess.run, [str(SETUP)], capture_output=True, text=True)
    if made.returncode:
        raise PdServeError(f"deploy/setup_peers.sh has failed: {made.stderr.strip().splitlines()[-1:]}")
    return SETUP.parents[1] / ".venv-peers"


def versions() -> dict[str, str]:
    """Of the routers."""
    lines = (SETUP.parent / "peers.lock").read_text().splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line)
    return {name: pinned[name] for name in ("vllm-router", "sglang-router")}


async def _size(
    size: int, loads: Sequence[Load], rounds: int, peers: Peers, console: rich.console.Console
) -> dict[str, Any]:
    settings = Settings.of_this_machine(size, **ENGINE)
    wanted = arms(size, settings, peers)
    check_memory(size)
    measured: dict[str, dict[str, list[Round]]] = {
        arm.name: {load.name: [] for load in loads} for arm in wanted
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn between loads only: it must not compete with what is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=rounds * len(wanted))
        for number in range(rounds):
            for arm in turns(wanted, number):
                progress.update(
                    task, description=f"{size} engines, round {number + 1}: {arm.name}", refresh=True
                )
                async with running(arm, settings) as servers:
                    await put_load(servers[-1].url, servers, WARM_UP, seed=-1)
                    for load in loads:
                        await at_rest(servers)
                        seen = await put_load(servers[-1].url, servers, load, number)
                        measured[arm.name][load.name].append(seen)
                progress.advance(task)
    return {
        "environment": settings.environment,
        "flags": settings.flags,
        "arms": {arm.name: _about(arm, settings, measured) for arm in wanted},
    }


async def at_rest(servers: Sequence[Server]) -> None:
    """Returns when they do nothing any more, or after `REST_S`."""
    used, deadline = sum(server.cpu_s() for server in servers), time.monotonic() + REST_S
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        before, used = used, sum(server.cpu_s() for server in servers)
        if used - before < REST_CORES:
            return


def _about(arm: Arm, settings: Settings, measured: dict[str, dict[str, list[Round]]]) -> dict[str, Any]:
    by_load = measured[arm.name]
    errors = [answer.error for rounds in by_load.values() for one in rounds for answer in one.answers]
    return {
        "title": TITLES[arm.name],
        "processes": [shown(process, settings) for process in arm.processes],
        "figures": {name: figures(rounds) for name, rounds in by_load.items()},
        "ratio_to_round_robin": {
            name: ratios(rounds, measured[PLAIN][name]) for name, rounds in by_load.items()
        },
        "rounds": {
            name: [{"load_average": one.load_average} | figures([one]) for one in rounds]
            for name, rounds in by_load.items()
        },
        "errors": sorted({error for error in errors if error})[:5],
    }


def turns(wanted: Sequence[Arm], number: int) -> list[Arm]:
    """Another one first each time, and the others in the opposite order every other time."""
    at = number % len(wanted)
    first, *others = [*wanted[at:], *wanted[:at]]
    return [first, *(others if number % 2 == 0 else reversed(others))]


def check_memory(size: int) -> None:
    """Raises: PdServeError: The processes would not fit into this machine's free memory."""
    needed = ARM_BYTES + size * ENGINE_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise PdServeError(
            f"{size} engines need about {needed / 2**30:.1f} GiB of memory,"
            f" and {available / 2**30:.1f} are free: give --engines {size - 1} or close something"
        )


@asynccontextmanager
async def running(arm: Arm, settings: Settings) -> AsyncIterator[list[Server]]:
    """All processes of an arm, the one that clients go to last. Ended on leaving.

    Raises:
        PdServeError: One did not come up.
    """
    async with AsyncExitStack() as stack:
        servers: list[Server] = []
        for processes in (arm.engines, [arm.front] if arm.front else []):
            commands = [process.as_command(settings) for process in processes]
            servers += await stack.enter_async_context(several(commands))
        yield servers
