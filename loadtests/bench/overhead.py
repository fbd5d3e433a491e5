"""`bench overhead`: the cost of our API server and of the way to an instance, against plain vLLM.

Two servers run at the same time with the same model, engine settings and environment: ours with one neutral
instance, and vLLM's own `python -m vllm.entrypoints.openai.api_server`. Each round puts the same load on
one and then on the other; the first one alternates. Noise of the machine thus affects both, and the result
is the median over the paired rounds. This process sends the load with vLLM's own request function in a
closed loop.
"""

import asyncio
import statistics
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass

import rich.console
from rich.table import Table

from loadtests.bench.clients import run_checked_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.rounds import RoundMedians
from loadtests.servers import OURS, STOCK, RunningServer, SharedSettings, free_port, running
from loadtests.terminal import new_progress, numbers_table

#: Targets; the second one is for one client.
MIN_THROUGHPUT_RATIO = 0.95
MAX_TTFT_ADDED_MS = 5.0

PAIRED_ROUNDS = 8

#: Pause between two loads, so that the end of one is not part of the next.
SETTLE_S = 0.2


def closed_loop(num_clients: int, num_requests: int, prompt_tokens: int, output_tokens: int) -> Load:
    """Equal requests from a number of clients."""
    lengths = Lengths.equal(prompt_tokens, output_tokens)
    return Load(str(num_clients), num_requests, lengths, num_clients=num_clients)


LOADS = tuple(closed_loop(clients, requests, 128, 64) for clients, requests in ((1, 8), (8, 32), (32, 96)))


@dataclass(frozen=True, slots=True)
class PairedRound:
    """The same load on both servers, one right after the other."""

    first: str
    ours: RoundMedians
    stock: RoundMedians


Rounds = dict[str, list[PairedRound]]


async def run(report: BenchmarkReport) -> None:
    """Measures, shows a table and writes the numbers. Takes about five minutes on two cores.

    Raises:
        PdServeError: A server did not start, or a request failed.
    """
    settings = SharedSettings.of_this_machine()
    console = report.console
    console.print("Both servers have these flags and this environment:")
    console.print("  " + " ".join(settings.flags))
    console.print("  " + " ".join(f"{name}={value}" for name, value in settings.environment.items()))
    commands = {OURS: settings.ours({"neutral": 1}, free_port()), STOCK: settings.stock(free_port())}
    async with AsyncExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            with console.status(f"starting {name}"):
                servers[name] = await stack.enter_async_context(running(command))
        rounds = await _measure(servers, console)
    result = summary(rounds)
    report.show(_table(rounds, result))
    numbers = {
        "loads": [asdict(load) for load in LOADS],
        "flags": settings.flags,
        "environment": settings.environment,
        "rounds": {clients: [asdict(pair) for pair in pairs] for clients, pairs in rounds.items()},
    }
    report.write(result | numbers)


async def _measure(servers: dict[str, RunningServer], console: rich.console.Console) -> Rounds:
    """All rounds by number of clients; the loads take turns."""
    rounds: Rounds = {load.name: [] for load in LOADS}
    for load in LOADS:
        for server in servers.values():  # warm-up
            await run_checked_round(server, load, seed=-1)
    with new_progress(console) as progress:
        task = progress.add_task("measuring", total=PAIRED_ROUNDS * len(LOADS))
        for number in range(PAIRED_ROUNDS):
            for load in LOADS:
                progress.update(task, description=f"{load.name} clients", refresh=True)
                order = (OURS, STOCK) if number % 2 == 0 else (STOCK, OURS)
                measured = {}
                for name in order:
                    await asyncio.sleep(SETTLE_S)
                    measured[name] = RoundMedians.of(await run_checked_round(servers[name], load, number))
                rounds[load.name].append(PairedRound(order[0], measured[OURS], measured[STOCK]))
                progress.advance(task)
    return rounds


def summary(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Medians over the paired rounds, by number of clients."""
    ratio, added = {}, {}
    for clients, pairs in rounds.items():
        ratios = [pair.ours.output_tokens_per_s / pair.stock.output_tokens_per_s for pair in pairs]
        ratio[clients] = round(statistics.median(ratios), 3)
        differences = [pair.ours.ttft_ms - pair.stock.ttft_ms for pair in pairs]
        added[clients] = round(statistics.median(differences), 2)
    return {"throughput_ratio": ratio, "ttft_added_ms": added}


def _table(rounds: Rounds, result: dict[str, dict[str, float]]) -> Table:
    title = f"{OURS} / {STOCK}, medians of {PAIRED_ROUNDS} paired rounds"
    columns = ("clients", "tokens/s", "ratio", "TTFT ms", "added ms", "ITL ms", "CPU ms/token")
    table = numbers_table(title, *columns)

    def both(pairs: list[PairedRound], name: str, digits: int) -> str:
        ours = statistics.median(getattr(pair.ours, name) for pair in pairs)
        stock = statistics.median(getattr(pair.stock, name) for pair in pairs)
        return f"{ours:.{digits}f} / {stock:.{digits}f}"

    for clients, pairs in rounds.items():
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
        f"targets: ratio ≥ {MIN_THROUGHPUT_RATIO}; with one client at most {MAX_TTFT_ADDED_MS:.0f} ms added"
    )
    return table


def _judged(text: str, reached: bool) -> str:
    return f"[{'green' if reached else 'red'}]{text}[/]"
