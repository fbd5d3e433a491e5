"""`pd-serve bench overhead`: what our front end and the way to an instance cost, against plain vLLM.

Two servers run at the same time with the same model, engine settings and environment: ours with one neutral
instance, and vLLM's own `python -m vllm.entrypoints.openai.api_server`. A round puts the same load on one and
then on the other; who is first alternates. Noise of the machine thus hits both, and the result is the median
over the paired rounds. The load is vLLM's own request function in a closed loop, in this process.
"""

import asyncio
import random
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.bench.completion import complete, fault
from loadtests.bench.servers import OURS, STOCK, Server, Settings, running
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on_sigterm
from pd_serve.observe import provenance as report

#: To reach, the second at one client.
MIN_THROUGHPUT_RATIO = 0.95
MAX_TTFT_ADDED_MS = 5.0

PAIRED_ROUNDS = 8

#: Between two loads, so that the end of one is not part of the next.
SETTLE_S = 0.2


@dataclass(frozen=True, slots=True)
class Load:
    """One round: `num_requests` from `num_clients`, each sending its next when its last has ended."""

    num_clients: int
    num_requests: int
    prompt_tokens: int = 128
    output_tokens: int = 64


LOADS = (Load(1, 8), Load(8, 32), Load(32, 96))


@dataclass(frozen=True, slots=True)
class Measured:
    """One server under one round's load.

    Attributes:
        ttft_ms, itl_ms: Medians over the requests, and over the gaps between tokens.
        cpu_ms_per_token: Of all processes of the server, per output token: steadier than times on a busy
            machine, and what throughput comes down to where cores are short.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    cpu_ms_per_token: float


@dataclass(frozen=True, slots=True)
class PairedRound:
    """The same load on both servers, one right after the other."""

    first: str
    ours: Measured
    stock: Measured


async def run(json_path: Path | None = None) -> None:
    """Measures, shows a table and writes the numbers. About five minutes on two cores.

    Raises:
        PdServeError: A server did not come up, a request failed, or the benchmark was stopped.
    """
    end_on_sigterm()
    provenance = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    settings = Settings.of_this_machine()
    console.print("Both servers have these flags and this environment:")
    console.print("  " + " ".join(settings.flags))
    console.print("  " + " ".join(f"{name}={value}" for name, value in settings.environment.items()))
    try:
        async with AsyncExitStack() as stack:
            servers = {}
            for name in (OURS, STOCK):
                with console.status(f"starting {name}"):
                    servers[name] = await stack.enter_async_context(running(name, settings))
            rounds = await measure(servers, console)
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: nothing was written") from None
    result = summary(rounds)
    console.print(_table(rounds, result))
    if json_path is not None:
        raw = {str(load.num_clients): [asdict(pair) for pair in pairs] for load, pairs in rounds.items()}
        about = {
            "loads": [asdict(load) for load in rounds],
            "flags": settings.flags,
            "environment": settings.environment,
            "rounds": raw,
        }
        report.write(json_path, result | provenance | about)
        console.print(f"written to {json_path}")


async def measure(servers: dict[str, Server], console: rich.console.Console) -> dict[Load, list[PairedRound]]:
    """All rounds against two servers, the sizes of load taking turns."""
    rounds: dict[Load, list[PairedRound]] = {load: [] for load in LOADS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for load in LOADS:
        for server in servers.values():  # to warm up
            await put_load(server, load, seed=-1)
    # Drawn between rounds only: it must not compete with what is measured.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=PAIRED_ROUNDS * len(LOADS))
        for number in range(PAIRED_ROUNDS):
            for load in LOADS:
                progress.update(task, description=f"{load.num_clients} clients", refresh=True)
                order = (OURS, STOCK) if number % 2 == 0 else (STOCK, OURS)
                seen = {}
                for name in order:
                    await asyncio.sleep(SETTLE_S)
                    seen[name] = await put_load(servers[name], load, seed=number)
                rounds[load].append(PairedRound(order[0], seen[OURS], seen[STOCK]))
                progress.advance(task)
    return rounds


async def put_load(server: Server, load: Load, seed: int) -> Measured:
    """One round's load on one server. The same seed sends the same prompts.

    Raises:
        PdServeError: A request failed, or brought another number of tokens than asked for.
    """
    dice = random.Random(f"{load} {seed}")
    prompts = iter(
        [dice.randrange(97, 123) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)
    )
    done: list[Any] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for prompt in prompts:
            done.append(
                await complete(
                    session,
                    server.url,
                    prompt,
                    prompt_tokens=load.prompt_tokens,
                    output_tokens=load.output_tokens,
                )
            )

    cpu_s, begin = server.cpu_s(), time.perf_counter()
    # New connections for every load: servers close those that were idle during the other one's turn.
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(load.num_clients):
            clients.create_task(client(session))
    seconds, cpu_s = time.perf_counter() - begin, server.cpu_s() - cpu_s
    num_tokens = load.num_requests * load.output_tokens
    for output in done:
        if wrong := fault(output, load.output_tokens):
            raise PdServeError(f"a request to {server.url} failed: {wrong}")
    return Measured(
        output_tokens_per_s=round(num_tokens / seconds, 2),
        ttft_ms=round(statistics.median(output.ttft for output in done) * 1e3, 3),
        itl_ms=round(statistics.median(gap for output in done for gap in output.itl) * 1e3, 3),
        cpu_ms_per_token=round(cpu_s / num_tokens * 1e3, 4),
    )


def summary(rounds: dict[Load, list[PairedRound]]) -> dict[str, dict[str, float]]:
    """Medians over the paired rounds, by number of clients."""
    ratio, added = {}, {}
    for load, pairs in rounds.items():
        ratios = [pair.ours.output_tokens_per_s / pair.stock.output_tokens_per_s for pair in pairs]
        ratio[str(load.num_clients)] = round(statistics.median(ratios), 3)
        differences = [pair.ours.ttft_ms - pair.stock.ttft_ms for pair in pairs]
        added[str(load.num_clients)] = round(statistics.median(differences), 2)
    return {"throughput_ratio": ratio, "ttft_added_ms": added}


def _table(rounds: dict[Load, list[PairedRound]], result: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"{OURS} / {STOCK}, medians of {PAIRED_ROUNDS} paired rounds")
    for column in ("clients", "tokens/s", "ratio", "TTFT ms", "added ms", "ITL ms", "CPU ms/token"):
        table.add_column(column, justify="right")

    def both(pairs: list[PairedRound], figure: str, digits: int) -> str:
        ours, stock = (
            statistics.median(getattr(side, figure) for side in sides)
            for sides in ([pair.ours for pair in pairs], [pair.stock for pair in pairs])
        )
        return f"{ours:.{digits}f} / {stock:.{digits}f}"

    for load, pairs in rounds.items():
        clients = str(load.num_clients)
        ratio, added = result["throughput_ratio"][clients], result["ttft_added_ms"][clients]
        table.add_row(
            clients,
            both(pairs, "output_tokens_per_s", 0),
            _judged(f"{ratio:.3f}", ratio >= MIN_THROUGHPUT_RATIO),
            both(pairs, "ttft_ms", 1),
            _judged(f"{added:+.2f}", added <= MAX_TTFT_ADDED_MS) if clients == "1" else f"{added:+.2f}",
            both(pairs, "itl_ms", 2),
            both(pairs, "cpu_ms_per_token", 2),
        )
    table.caption = (
        f"to reach: ratio ≥ {MIN_THROUGHPUT_RATIO}, at one client at most {MAX_TTFT_ADDED_MS:.0f} ms added"
    )
    return table


def _judged(text: str, reached: bool) -> str:
    return f"[{'green' if reached else 'red'}]{text}[/]"
