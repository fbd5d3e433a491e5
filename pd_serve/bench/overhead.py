"""`pd-serve bench overhead`: what our front end and the way to an instance cost, against plain vLLM.

Two servers run at the same time with the same model, engine settings and environment: ours with one neutral
instance, and vLLM's own `python -m vllm.entrypoints.openai.api_server`. A round puts the same load on one and
then on the other; who is first alternates. Noise of the machine thus hits both, and the result is the median
over the paired rounds. The load is vLLM's own request function in a closed loop, in this process.
"""

import asyncio
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from migration.errors import PdServeError
from pd_serve import models
from pd_serve.bench import report
from pd_serve.config import ServeConfig, cpu_engine_defaults, is_cpu_build, process_environment
from pd_serve.engine_flags import CHANGED_DEFAULTS

MODEL = "tiny"
OURS, STOCK = "pd-serve", "vllm"

#: To reach, the second at one client.
MIN_THROUGHPUT_RATIO = 0.95
MAX_TTFT_ADDED_MS = 5.0

PAIRED_ROUNDS = 12
START_S = 120.0
STOP_S = 10.0

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
    """One server under one round's load; the times are medians over its requests and tokens."""

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True)
class PairedRound:
    """The same load on both servers, one right after the other."""

    first: str
    ours: Measured
    stock: Measured


@dataclass(frozen=True, slots=True)
class Settings:
    """What both servers are started with."""

    model: str
    flags: list[str]
    environment: dict[str, str]

    @classmethod
    def of_this_machine(cls) -> Self:
        """The defaults of `pd-serve serve tiny --neutral 1`, written out for both command lines."""
        model = models.resolve(MODEL)
        config = ServeConfig(MODEL, {"prefill": 0, "decode": 0, "neutral": 1})
        values: dict[str, Any] = {"dtype": models.default_dtype(MODEL), "max_num_batched_tokens": 2048}
        values |= cpu_engine_defaults() if is_cpu_build() else {"gpu_memory_utilization": 0.4}
        return cls(model, as_flags(values | dict(CHANGED_DEFAULTS)), process_environment(config, model))

    def command(self, name: str, port: int) -> list[str]:
        """The command line of one of the two servers."""
        flags = [f"--served-model-name={MODEL}", "--host=127.0.0.1", f"--port={port}", *self.flags]
        if name == OURS:
            script = Path(sys.executable).with_name("pd-serve")
            return [str(script), "serve", self.model, "--neutral=1", *flags]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.model}", *flags]


def as_flags(values: dict[str, Any]) -> list[str]:
    """As flags: `{"block_size": 32, "enforce_eager": True}` → `--block-size=32 --enforce-eager`."""

    def flag(name: str, value: Any) -> str:
        name = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name}={value}"

    return [flag(name, value) for name, value in values.items()]


@asynccontextmanager
async def running(name: str, settings: Settings) -> AsyncIterator[str]:
    """One of the servers as a process of its own, ended on leaving. Gives its URL when it is ready.

    Raises:
        PdServeError: It did not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *settings.command(name, port),
            stdout=log,
            stderr=log,
            env=os.environ | settings.environment,
            start_new_session=True,
        )
        try:
            if not await _is_up(url, process):
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
                raise PdServeError(f"{name} did not come up within {START_S:.0f} s; it said: {said[-1]}")
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


async def _is_up(url: str, process: asyncio.subprocess.Process) -> bool:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while process.returncode is None and time.monotonic() < deadline:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.2)
    return False


async def run(json_path: Path | None = None) -> None:
    """Measures, shows a table and writes the numbers. About five minutes on two cores.

    Raises:
        PdServeError: A server did not come up, or a request failed.
    """
    provenance = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    settings = Settings.of_this_machine()
    console.print("Both servers have these flags and this environment:")
    console.print("  " + " ".join(settings.flags))
    console.print("  " + " ".join(f"{name}={value}" for name, value in settings.environment.items()))
    async with AsyncExitStack() as stack:
        urls = {}
        for name in (OURS, STOCK):
            with console.status(f"starting {name}"):
                urls[name] = await stack.enter_async_context(running(name, settings))
        rounds = await measure(urls, console)
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


async def measure(urls: dict[str, str], console: rich.console.Console) -> dict[Load, list[PairedRound]]:
    """All rounds against two servers, the sizes of load taking turns."""
    rounds: dict[Load, list[PairedRound]] = {load: [] for load in LOADS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for load in LOADS:
            for url in urls.values():
                await put_load(session, url, load, seed=-load.num_clients)
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
                        seen[name] = await put_load(session, urls[name], load, seed=number)
                    rounds[load].append(PairedRound(order[0], seen[OURS], seen[STOCK]))
                    progress.advance(task)
    return rounds


async def put_load(session: aiohttp.ClientSession, url: str, load: Load, seed: int) -> Measured:
    """One round's load on one server. The same seed sends the same prompts.

    Raises:
        PdServeError: A request failed, or brought another number of tokens than asked for.
    """
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    dice = random.Random(f"{load} {seed}")
    requests = iter(
        RequestFuncInput(
            prompt=[dice.randrange(97, 123) for _ in range(load.prompt_tokens)],
            api_url=f"{url}/v1/completions",
            prompt_len=load.prompt_tokens,
            output_len=load.output_tokens,
            model=MODEL,
            ignore_eos=True,
            extra_body={"temperature": 0.0},
        )
        for _ in range(load.num_requests)
    )
    done: list[Any] = []

    async def client() -> None:
        for request in requests:
            done.append(await async_request_openai_completions(request, session))

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(load.num_clients):
            clients.create_task(client())
    seconds = time.perf_counter() - begin
    for output in done:
        if not output.success or output.output_tokens != load.output_tokens:
            why = output.error.strip().splitlines()[-1:] or [f"{output.output_tokens} tokens came"]
            raise PdServeError(f"a request to {url} failed: {why[0]}")
    return Measured(
        output_tokens_per_s=round(load.num_requests * load.output_tokens / seconds, 2),
        ttft_ms=round(statistics.median(output.ttft for output in done) * 1e3, 3),
        itl_ms=round(statistics.median(gap for output in done for gap in output.itl) * 1e3, 3),
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
    for column in ("clients", "tokens/s", "ratio", "TTFT ms", "added ms", "ITL ms"):
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
        )
    table.caption = (
        f"to reach: ratio ≥ {MIN_THROUGHPUT_RATIO}, at one client at most {MAX_TTFT_ADDED_MS:.0f} ms added"
    )
    return table


def _judged(text: str, reached: bool) -> str:
    return f"[{'green' if reached else 'red'}]{text}[/]"
