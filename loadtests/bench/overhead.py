"""`bench overhead`: the cost of our API server and of the way to an instance, against plain vLLM.

Two servers run at the same time with the same model, engine settings and environment: ours with one neutral
instance, and vLLM's own `python -m vllm.entrypoints.openai.api_server`. Each round puts the same load on
one and then on the other; the first one alternates. Noise of the machine thus affects both, and the result
is the median over the paired rounds. This process sends the load with vLLM's own request function in a
closed loop.
"""

import asyncio
import math
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from operator import attrgetter

import rich.console
from rich.table import Table

from loadtests.bench.clients import run_checked_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.rounds import RoundMedians
from loadtests.servers import OURS, STOCK, RunningServer, SharedSettings, free_port, running
from loadtests.terminal import new_progress, numbers_table

#: Targets, by load where they differ.
MIN_THROUGHPUT_RATIO = 0.99
MAX_TTFT_ADDED_MS = {"1": 1.0, "32": 3.0}
MIN_API_SERVER_RATIO = {"64": 1.5, "64 chats": 1.5}

#: Pause between two loads, so that the end of one is not part of the next.
SETTLE_S = 0.2


def closed_loop(
    num_clients: int, num_requests: int, prompt_tokens: int, output_tokens: int, *, as_chat: bool = False
) -> Load:
    """A number of clients with requests whose lengths differ by half to either side of these.

    Requests of equal lengths that begin together end together: they go through the engine in waves, whose
    number in a run is chance, and with it the time to the first token.
    """
    prompt, output = ((tokens // 2, tokens + tokens // 2) for tokens in (prompt_tokens, output_tokens))
    name = f"{num_clients} chats" if as_chat else str(num_clients)
    return Load(name, num_requests, Lengths(prompt, output), num_clients=num_clients, as_chat=as_chat)


LOADS = (
    *(
        closed_loop(clients, requests, 128, 64)
        for clients, requests in ((1, 16), (8, 64), (32, 160), (128, 384))
    ),
    # Long enough that tokens weigh more than requests.
    closed_loop(64, 128, 128, 256),
    closed_loop(64, 128, 128, 256, as_chat=True),
)


@dataclass(frozen=True, slots=True)
class ApiServerUse:
    """What a server's API server used in a round.

    Attributes:
        tokens_per_cpu_s: Output tokens per second of its CPU time.
        tokens_per_chunk: More than 1 where clients got several tokens in one event, which costs less.
    """

    tokens_per_cpu_s: float
    tokens_per_chunk: float


@dataclass(frozen=True, slots=True)
class PairedRound:
    """The same load on both servers, one right after the other."""

    first: str
    ours: RoundMedians
    stock: RoundMedians
    our_api_server: ApiServerUse
    stock_api_server: ApiServerUse


Rounds = dict[str, list[PairedRound]]


async def run(report: BenchmarkReport, num_rounds: int) -> None:
    """Measures, shows a table and writes the numbers. Takes about two minutes per round on two cores.

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
        rounds = await _measure(servers, num_rounds, console)
    result = summary(rounds)
    report.show(_table(rounds, result))
    numbers = {
        "loads": [asdict(load) for load in LOADS],
        "flags": settings.flags,
        "environment": settings.environment,
        "rounds": {clients: [asdict(pair) for pair in pairs] for clients, pairs in rounds.items()},
    }
    report.write(result | numbers)


async def _measure(
    servers: dict[str, RunningServer], num_rounds: int, console: rich.console.Console
) -> Rounds:
    """All rounds by number of clients; the loads take turns."""
    rounds: Rounds = {load.name: [] for load in LOADS}
    for load in LOADS:
        for server in servers.values():  # warm-up
            await run_checked_round(server, load, seed=-1)
    with new_progress(console) as progress:
        task = progress.add_task("measuring", total=num_rounds * len(LOADS))
        for number in range(num_rounds):
            for load in LOADS:
                progress.update(task, description=f"{load.name} clients", refresh=True)
                order = (OURS, STOCK) if number % 2 == 0 else (STOCK, OURS)
                measured = {}
                for name in order:
                    await asyncio.sleep(SETTLE_S)
                    measured[name] = await _round(servers[name], load, number)
                (ours, our_use), (stock, stock_use) = measured[OURS], measured[STOCK]
                rounds[load.name].append(PairedRound(order[0], ours, stock, our_use, stock_use))
                progress.advance(task)
    return rounds


async def _round(server: RunningServer, load: Load, number: int) -> tuple[RoundMedians, ApiServerUse]:
    before_s = server.api_server_cpu_s()
    measured = await run_checked_round(server, load, number)
    used_s = server.api_server_cpu_s() - before_s
    chunks = sum(len(outcome.gaps_s) + 1 for outcome in measured.outcomes)
    use = ApiServerUse(round(measured.num_tokens / used_s), round(measured.num_tokens / chunks, 3))
    return RoundMedians.of(measured), use


def summary(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Medians over the paired rounds, by number of clients."""
    ratio, added, api_server = {}, {}, {}
    for clients, pairs in rounds.items():
        ratios = [pair.ours.output_tokens_per_s / pair.stock.output_tokens_per_s for pair in pairs]
        ratio[clients] = round(statistics.median(ratios), 3)
        differences = [pair.ours.ttft_ms - pair.stock.ttft_ms for pair in pairs]
        added[clients] = round(statistics.median(differences), 2)
        uses = [
            pair.our_api_server.tokens_per_cpu_s / pair.stock_api_server.tokens_per_cpu_s for pair in pairs
        ]
        api_server[clients] = round(statistics.median(uses), 2)
    return {"throughput_ratio": ratio, "ttft_added_ms": added, "api_server_ratio": api_server}


def _table(rounds: Rounds, result: dict[str, dict[str, float]]) -> Table:
    title = f"{OURS} / {STOCK}, medians of {len(next(iter(rounds.values())))} paired rounds"
    columns = ("clients", "tokens/s", "ratio", "TTFT ms", "added ms", "ITL ms", "CPU ms/token")
    table = numbers_table(title, *columns, "API server's tokens/CPU s", "ratio", "tokens/chunk")

    def both(pairs: Sequence[object], name: str, digits: int) -> str:
        """Args: `name`: Of an attribute, with `{}` for the server's part of it."""
        ours, stock = (
            statistics.median(attrgetter(name.format(*part))(pair) for pair in pairs)
            for part in (("ours", "our_api_server"), ("stock", "stock_api_server"))
        )
        return f"{ours:.{digits}f} / {stock:.{digits}f}"

    for clients, pairs in rounds.items():
        ratio, added = result["throughput_ratio"][clients], result["ttft_added_ms"][clients]
        api_server = result["api_server_ratio"][clients]
        table.add_row(
            clients,
            both(pairs, "{0}.output_tokens_per_s", 0),
            _judged(f"{ratio:.3f}", ratio >= MIN_THROUGHPUT_RATIO),
            both(pairs, "{0}.ttft_ms", 1),
            _judged(f"{added:+.2f}", added <= MAX_TTFT_ADDED_MS.get(clients, math.inf)),
            both(pairs, "{0}.itl_ms", 2),
            both(pairs, "{0}.cpu_ms_per_token", 2),
            both(pairs, "{1}.tokens_per_cpu_s", 0),
            _judged(f"{api_server:.2f}", api_server >= MIN_API_SERVER_RATIO.get(clients, 0.0)),
            both(pairs, "{1}.tokens_per_chunk", 2),
        )
    table.caption = (
        f"targets: ratio ≥ {MIN_THROUGHPUT_RATIO}; added at most "
        + ", ".join(f"{ms:.0f} ms with {clients}" for clients, ms in MAX_TTFT_ADDED_MS.items())
        + "; API server "
        + ", ".join(f"≥ {least} with {clients}" for clients, least in MIN_API_SERVER_RATIO.items())
    )
    return table


def _judged(text: str, reached: bool) -> str:
    return f"[{'green' if reached else 'red'}]{text}[/]"
