"""`bench compare`: pd-serve beside plain vLLM and vLLM's own disaggregation, on one machine, in one run.

For each number of engines the arms (`loadtests.bench.arms`) get the same load in turn. The order changes in
every round, so that noise of the machine affects all arms. An arm's processes run during its turn only:
engines with a NixlConnector keep one core each busy while they are idle. Before that, the routers are
measured alone (`loadtests.bench.routers`).
"""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import rich.console

from loadtests.bench import compare_tables, routers
from loadtests.bench.arms import PLAIN, TITLES, Arm, ArmBuilder, described
from loadtests.bench.clients import run_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.rounds import Round, median_ratios, summarize_rounds
from loadtests.servers import RunningServer, SharedSettings, all_running, free_port
from loadtests.terminal import new_progress
from pd_serve.errors import PdServeError

#: Prompts of a chat, and one prompt in ten with a document.
LENGTHS = Lengths(prompt=(64, 512), output=(16, 224), long_prompt=(1024, 1792), long_share=0.1)
WARM_UP = Load("warm-up", 8, LENGTHS, num_clients=4, as_text=True)

#: Time limit for an arm to become idle before each load, and the number of busy cores that counts as idle.
IDLE_TIMEOUT_S, IDLE_CORES = 15.0, 0.25

#: Conversations, and answers of which one in ten is thirty times as long as the others.
TURN_LENGTHS = Lengths(prompt=(64, 384), output=(16, 160))
SKEWED_LENGTHS = Lengths(prompt=(32, 256), output=(8, 48), long_share=0.1, long_output=(600, 1200))

#: The same for all arms: a cache that is scarce, as on a GPU with a real model (8,160 tokens), and prompts in
#: chunks of our default on a CPU, which also keeps a plain engine's decoding going.
ENGINE = {"kv_cache_memory_bytes": 32 * 2**20, "max_model_len": 4096, "max_num_batched_tokens": 512}

#: Memory of one arm's processes: measured, rounded up.
ARM_BYTES, ENGINE_BYTES = 600 * 2**20, 900 * 2**20

SETUP = Path(__file__).parents[2] / "deploy" / "setup_peers.sh"

#: Measured rounds by arm and load.
Rounds = dict[str, dict[str, list[Round]]]


async def run(
    report: BenchmarkReport,
    *,
    sizes: Sequence[int],
    rounds: int,
    rate: float,
    num_requests: int,
    names: Sequence[str] = (),
) -> None:
    """Measures, shows tables and writes the numbers after each. Takes about half an hour for each size.

    Args:
        sizes: Numbers of engines, each at least two.
        names: Of the arms, plain vLLM in turns among them; all if there are none.
        rounds: Rounds per size; in each, every arm has one turn at each load.
        rate: Requests/s of the open loop.
        num_requests: Requests of each load in each round.

    Raises:
        PdServeError: The routers could not be installed, a process did not start, or memory is short.
    """
    routers_folder = await install_routers(report.console)
    report.provenance["versions"] |= router_versions()
    loads = [
        Load("steady", num_requests, LENGTHS, rate=rate, as_text=True),
        Load("full", num_requests, LENGTHS, num_clients=16, as_text=True),
        Load("turns", num_requests, TURN_LENGTHS, num_clients=6, as_text=True, turns=4),
        Load("skewed", num_requests, SKEWED_LENGTHS, num_clients=16, as_text=True),
    ]
    numbers: dict[str, Any] = {"loads": [asdict(load) for load in loads], "engine": ENGINE, "sizes": {}}
    numbers["routers"] = await routers.run(routers_folder, report.console)
    report.show(compare_tables.routers(numbers["routers"]))
    report.write(numbers)
    for size in sizes:
        settings = SharedSettings.of_this_machine(size, **ENGINE)
        arms = ArmBuilder(settings, routers_folder, free_port).all_arms(size)
        arms = [arm for arm in arms if not names or arm.name in names]
        check_memory(size)
        measured = await _measure(arms, loads, rounds, report.console)
        numbers["sizes"][str(size)] = {
            "environment": settings.environment,
            "flags": settings.flags,
            "arms": {arm.name: _numbers(arm, settings, measured) for arm in arms},
        }
        report.show(compare_tables.arms(size, numbers["sizes"][str(size)]))
        report.write(numbers)


async def install_routers(console: rich.console.Console) -> Path:
    """Installs the public routers if necessary and returns the folder of their Python environment.

    Raises:
        PdServeError: The script failed, or is missing.
    """
    if not SETUP.is_file():
        raise PdServeError("deploy/setup_peers.sh, which installs the routers, is missing: use a checkout")
    with console.status("installing vllm-router and sglang-router"):
        made = await asyncio.to_thread(subprocess.run, [str(SETUP)], capture_output=True, text=True)
    if made.returncode:
        raise PdServeError(f"deploy/setup_peers.sh failed: {made.stderr.strip().splitlines()[-1:]}")
    return SETUP.parents[1] / ".venv-peers"


def router_versions() -> dict[str, str]:
    """The locked versions of the public routers."""
    lines = (SETUP.parent / "peers.lock").read_text().splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line)
    return {name: pinned[name] for name in ("vllm-router", "sglang-router")}


async def _measure(
    arms: Sequence[Arm], loads: Sequence[Load], rounds: int, console: rich.console.Console
) -> Rounds:
    measured: Rounds = {arm.name: {load.name: [] for load in loads} for arm in arms}
    with new_progress(console) as progress:
        task = progress.add_task("", total=rounds * len(arms))
        for number in range(rounds):
            for arm in turns(arms, number):
                progress.update(task, description=f"round {number + 1}: {arm.name}", refresh=True)
                async with running_arm(arm) as servers:
                    cpu_s = total_cpu_s(servers)
                    await run_round(servers[-1].url, cpu_s, WARM_UP, seed=-1)
                    for load in loads:
                        await _until_idle(cpu_s)
                        measured[arm.name][load.name].append(
                            await run_round(servers[-1].url, cpu_s, load, number)
                        )
                progress.advance(task)
    return measured


def total_cpu_s(servers: Sequence[RunningServer]) -> Callable[[], float]:
    """Returns the CPU time of all processes so far, in seconds, whenever it is called."""
    return lambda: sum(server.cpu_s() for server in servers)


async def _until_idle(cpu_s: Callable[[], float]) -> None:
    """Returns when the processes use less than `IDLE_CORES`, or after `IDLE_TIMEOUT_S`."""
    used, deadline = cpu_s(), time.monotonic() + IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        before, used = used, cpu_s()
        if used - before < IDLE_CORES:
            return


def _numbers(arm: Arm, settings: SharedSettings, measured: Rounds) -> dict[str, Any]:
    by_load = measured[arm.name]
    errors = {outcome.error for rounds in by_load.values() for one in rounds for outcome in one.outcomes}
    return {
        "title": TITLES[arm.name],
        "processes": [described(process, settings) for process in arm.processes],
        "figures": {name: summarize_rounds(rounds) for name, rounds in by_load.items()},
        "ratio_to_round_robin": {
            name: median_ratios(rounds, measured[PLAIN][name]) for name, rounds in by_load.items()
        },
        "rounds": {
            name: [{"load_average": one.load_average} | summarize_rounds([one]) for one in rounds]
            for name, rounds in by_load.items()
        },
        "errors": sorted(error for error in errors if error is not None)[:5],
    }


def turns(arms: Sequence[Arm], number: int) -> list[Arm]:
    """The order of the arms in a round: another one first each time, the others reversed every other time."""
    at = number % len(arms)
    first, *others = [*arms[at:], *arms[:at]]
    return [first, *(others if number % 2 == 0 else reversed(others))]


def check_memory(size: int) -> None:
    """Raises: PdServeError: The processes of `size` engines would not fit into the free memory."""
    needed = ARM_BYTES + size * ENGINE_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise PdServeError(
            f"{size} engines need about {needed / 2**30:.1f} GiB of memory,"
            f" and {available / 2**30:.1f} are free: give --engines {size - 1} or end other programs"
        )


@asynccontextmanager
async def running_arm(arm: Arm) -> AsyncIterator[list[RunningServer]]:
    """All processes of an arm until the end of the block; the last one is the one that clients send to.

    Raises:
        PdServeError: One did not start.
    """
    async with AsyncExitStack() as stack:
        servers: list[RunningServer] = []
        for commands in (arm.engines, [arm.router] if arm.router else []):
            servers += await stack.enter_async_context(all_running(commands))
        yield servers
