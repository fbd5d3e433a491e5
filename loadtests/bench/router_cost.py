"""The first part of `pd-serve bench compare`: what is before the engines alone, with engines that only wait.

The public routers stand before a stub that streams (`loadtests.bench.stub_backend`): what they add is their
time to the first token less that of the stub alone. Ours is no hop before servers, it is the server: HTTP,
parsing, detokenizing and routing in one process, before engines that are simulated and as fast as the stub.
So beside the routers' CPU time stands that of vLLM's own server process, which does it behind a router.
"""

import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import rich.console
from rich.progress import Progress

from loadtests.bench.arms import HOST, OURS_SCRIPT, Peers, Process
from loadtests.bench.clients import put_load
from loadtests.bench.seen import Load, Round
from loadtests.bench.servers import MODEL, OURS, STOCK, Server, Settings, free_port, several
from loadtests.bench.stub_backend import TOKEN_S
from pd_serve.errors import PdServeError

STUB, VLLM_ROUTER, SGLANG_ROUTER = "stub", "vllm-router", "sglang-router"

#: Of all requests, so that nothing but what is measured differs.
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32

ROUNDS = 4


@dataclass(frozen=True, slots=True)
class EvenLoad(Load):
    """Equal requests in a closed loop."""

    def lengths(self, dice: Random) -> tuple[int, int]:
        return PROMPT_TOKENS, OUTPUT_TOKENS


ONE, MANY = EvenLoad("one client", 20, num_clients=1), EvenLoad("16 clients", 96, num_clients=16)


@dataclass(frozen=True, slots=True)
class FirstProcess:
    """A server of which only the process that was started counts: not its engines."""

    server: Server

    def cpu_s(self) -> float:
        spent = self.server.process.cpu_times()
        return float(spent.user + spent.system)


async def run(peers: Peers, console: rich.console.Console) -> dict[str, Any]:
    """Two minutes.

    Raises:
        PdServeError: A process did not come up, or a request failed.
    """
    async with AsyncExitStack() as stack:
        with console.status("starting routers, a stub, and servers to compare them with"):
            targets = await stack.enter_async_context(_running(peers))
        rounds: dict[str, dict[str, list[Round]]] = {
            name: {load.name: [] for load in (ONE, MANY)} for name in targets
        }
        progress = stack.enter_context(Progress(console=console, auto_refresh=False, transient=True))
        task = progress.add_task("routers alone", total=ROUNDS * len(targets) * 2)
        for number in range(-1, ROUNDS):  # the first to warm up
            progress.refresh()
            for load in (ONE, MANY):
                for name, server in targets.items():
                    seen = await put_load(server.url, [FirstProcess(server)], load, number)
                    if failed := [answer.error for answer in seen.answers if answer.error]:
                        raise PdServeError(f"a request to {name} failed: {failed[0]}")
                    if number >= 0:
                        rounds[name][load.name].append(seen)
                        progress.advance(task)
    return {
        "loads": [asdict(load) for load in (ONE, MANY)],
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "token_ms": TOKEN_S * 1e3,
        "load_averages": [one.load_average for one in rounds[STUB][ONE.name]],
        "targets": summary(rounds),
    }


def summary(rounds: dict[str, dict[str, list[Round]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; what a router adds is told by pairs with the stub alone.

    Requests/s per core: how many a core would do if it did nothing but this process's work, with 16 clients.
    """
    result = {}
    for name, by_load in rounds.items():
        pairs = list(zip(by_load[ONE.name], rounds[STUB][ONE.name], strict=True))
        cpu_s = statistics.median(one.cpu_s / len(one.answers) for one in by_load[MANY.name])
        result[name] = {
            "ttft_ms": _ms(statistics.median(_ttft_s(one) for one, _ in pairs)),
            "cpu_ms_per_request": _ms(cpu_s),
            "requests_per_s_per_core": round(1 / cpu_s, 1),
            "requests_per_s": round(
                statistics.median(len(one.answers) / one.seconds for one in by_load[MANY.name]), 1
            ),
        }
        if name in (VLLM_ROUTER, SGLANG_ROUTER):
            added_s = statistics.median(_ttft_s(one) - _ttft_s(stub) for one, stub in pairs)
        elif name == OURS:
            added_s = statistics.median(_ttft_s(one) for one, _ in pairs) - TOKEN_S
        else:
            continue
        result[name]["added_ttft_ms"] = _ms(added_s)
    return result


def _ttft_s(one: Round) -> float:
    return statistics.median(answer.ttft_s for answer in one.answers)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def step_table(step_ms: float = TOKEN_S * 1e3) -> str:
    """For `--cost-model`: every step takes as long, by default as the stub's."""
    rows = [f"prefill,1,{n},0,{step_ms}" for n in (16, 128, 512)]
    rows += [f"decode,{n},{n},{n * 100},{step_ms}" for n in (1, 8, 64)]
    return "\n".join(["phase,batch_size,new_tokens,context_tokens,ms", *rows]) + "\n"


@asynccontextmanager
async def _running(peers: Peers) -> AsyncIterator[dict[str, Server]]:
    settings = Settings.of_this_machine(2)
    stub, stock, ours = (free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.csv"
        steps.write_text(step_table())
        simulated = ["--neutral=1", "--engine=simulated", f"--cost-model={steps}"]
        backends = [
            Process(STUB, [sys.executable, "-m", "loadtests.bench.stub_backend", str(stub)], stub, {}),
            Process(STOCK, settings.command(STOCK, stock), stock, {}),
            Process(
                OURS, [OURS_SCRIPT, "serve", MODEL, f"--host={HOST}", f"--port={ours}", *simulated], ours, {}
            ),
        ]
        flags = ["--policy=round_robin", "--worker-urls", backends[0].url]
        routers = [peers.vllm_router(flags), peers.sglang_router(flags)]
        async with (
            several([one.as_command(settings) for one in backends]) as first,
            several([one.as_command(settings) for one in routers]) as second,
        ):
            names = [process.name for process in (*backends, *routers)]
            yield dict(zip(names, (*first, *second), strict=True))
