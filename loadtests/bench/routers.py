"""The first part of `bench compare`: the processes in front of the engines, alone.

The public routers stand in front of a stub that streams (`loadtests.bench.stub_backend`): a router adds its
time to the first token minus that of the stub alone. pd-serve is no extra hop, it is the server: HTTP,
parsing, detokenizing and routing in one process, here in front of simulated engines as fast as the stub. A
router needs vLLM's own server process for the same work, so that process's CPU time is measured too.
"""

import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.console

from loadtests.bench.arms import ArmBuilder
from loadtests.bench.clients import run_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.rounds import Round
from loadtests.bench.simulated_server import simulated_server, write_step_table
from loadtests.bench.stub_backend import TOKEN_S
from loadtests.latency_statistics import to_ms
from loadtests.servers import OURS, RunningServer, ServerCommand, SharedSettings, all_running, free_port
from loadtests.terminal import new_progress

STUB, VLLM_ROUTER, SGLANG_ROUTER = "stub", "vllm-router", "sglang-router"

#: Equal requests, so that only the measured process differs.
LENGTHS = Lengths.equal(128, 32)
ONE = Load("one client", 20, LENGTHS, num_clients=1, as_text=True)
MANY = Load("16 clients", 96, LENGTHS, num_clients=16, as_text=True)

ROUNDS = 4

#: Rounds by target and load.
Rounds = dict[str, dict[str, list[Round]]]


async def run(routers_folder: Path, console: rich.console.Console) -> dict[str, Any]:
    """Measures for about two minutes and returns the numbers.

    Raises:
        PdServeError: A process did not start, or a request failed.
    """
    builder = ArmBuilder(SharedSettings.of_this_machine(2), routers_folder, free_port)
    async with _targets(builder, console) as targets:
        rounds: Rounds = {name: {load.name: [] for load in (ONE, MANY)} for name in targets}
        with new_progress(console) as progress:
            task = progress.add_task("routers alone", total=ROUNDS * len(targets) * 2)
            for number in range(-1, ROUNDS):  # the first one is a warm-up
                progress.refresh()
                for load in (ONE, MANY):
                    for name, server in targets.items():
                        measured = await run_round(server.url, server.front_end_cpu_s, load, number)
                        measured.check(name)
                        if number >= 0:
                            rounds[name][load.name].append(measured)
                            progress.advance(task)
    return {
        "loads": [asdict(load) for load in (ONE, MANY)],
        "token_ms": TOKEN_S * 1e3,
        "load_averages": [one.load_average for one in rounds[STUB][ONE.name]],
        "targets": summary(rounds),
    }


def summary(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Medians over the rounds. The time that a router adds is the median over pairs with the stub alone.

    Requests/s per core: the number that one core could serve if it did only this process's work, with 16
    clients.
    """
    result = {}
    for name, by_load in rounds.items():
        pairs = list(zip(by_load[ONE.name], rounds[STUB][ONE.name], strict=True))
        cpu_s = statistics.median(one.cpu_s / len(one.outcomes) for one in by_load[MANY.name])
        result[name] = {
            "ttft_ms": to_ms(statistics.median(_ttft_s(one) for one, _ in pairs)),
            "cpu_ms_per_request": to_ms(cpu_s),
            "requests_per_s_per_core": round(1 / cpu_s, 1),
            "requests_per_s": round(
                statistics.median(len(one.outcomes) / one.seconds for one in by_load[MANY.name]), 1
            ),
        }
        if name in (VLLM_ROUTER, SGLANG_ROUTER):
            added_s = statistics.median(_ttft_s(one) - _ttft_s(stub) for one, stub in pairs)
        elif name == OURS:
            added_s = statistics.median(_ttft_s(one) for one, _ in pairs) - TOKEN_S
        else:
            continue
        result[name]["added_ttft_ms"] = to_ms(added_s)
    return result


def _ttft_s(one: Round) -> float:
    return statistics.median(outcome.ttft_s or 0.0 for outcome in one.outcomes)


@asynccontextmanager
async def _targets(
    builder: ArmBuilder, console: rich.console.Console
) -> AsyncIterator[dict[str, RunningServer]]:
    """All measured processes by name, from their readiness to the end of the block."""
    settings, stub_port = builder.settings, free_port()
    stub = [sys.executable, "-m", "loadtests.bench.stub_backend", str(stub_port)]
    with tempfile.TemporaryDirectory() as folder:
        cost_model = write_step_table(Path(folder), TOKEN_S * 1e3)
        backends = [
            ServerCommand(STUB, stub, stub_port, settings.environment),
            settings.stock(free_port()),
            simulated_server(OURS, cost_model, free_port(), settings.environment),
        ]
        router_flags = ["--policy=round_robin", "--worker-urls", backends[0].url]
        routers = [builder.vllm_router(router_flags), builder.sglang_router(router_flags)]
        with console.status("starting the routers, a stub, and servers to compare them with") as status:
            async with all_running(backends) as first, all_running(routers) as second:
                status.stop()
                names = [process.name for process in (*backends, *routers)]
                yield dict(zip(names, (*first, *second), strict=True))
