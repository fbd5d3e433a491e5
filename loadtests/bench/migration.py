"""`bench migration`: the cost of moving a running request live, with a blocking copy and by recompute.

One cluster (1 prefill, 2 decode instances) serves all measurements. A request of each length is handed off,
then moved between the decode instances in each of the three ways. Then several requests, which decode in one
batch, move at the same time. Gaps are measured in the API server, where the tokens of a request are put in
order. The source's step time is taken from the moving request's own tokens, before and during the copy of its
blocks.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import rich.console
from rich.table import Table

from loadtests.bench.in_process import InProcessService
from loadtests.bench.report import BenchmarkReport
from loadtests.terminal import new_progress, numbers_table
from pd_serve.config import ServeConfig
from pd_serve.errors import PdServeError
from pd_serve.frontend.manual_migration import MigrationMode

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)

#: Longer requests are not moved by recompute, which takes most of a minute.
MAX_RECOMPUTED = 4096

#: Requests that move at the same time, the length of each, and how often they move in one round.
TOGETHER, TOGETHER_LENGTH, TOGETHER_MOVES = 8, 1024, 4

MODES: tuple[MigrationMode, ...] = ("live", "blocking", "recompute")

#: Limit of a moved request's output: more than it generates until it is aborted after its last move.
MAX_TOKENS = 2048

#: Tokens between two moves: enough to measure the undisturbed step time.
TOKENS_BETWEEN = 10


@dataclass
class TokenLog:
    """Arrival times of one request's tokens, and the instance that sent each."""

    times: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def gaps_ms(self, begin: int, end: int) -> list[float]:
        """Gaps before the tokens begin..end-1, without those between two instances."""
        return [
            (self.times[i] - self.times[i - 1]) * 1e3
            for i in range(max(begin, 1), min(end, len(self.times)))
            if self.sources[i] == self.sources[i - 1]
        ]


@dataclass
class LengthSamples:
    """All measurements at one length, in milliseconds.

    Attributes:
        normal: Gaps between tokens while nothing moves.
        during: Gaps at the source during a live copy.
        gaps: Gaps across a move, by mode.
        handoff: Gaps between the first and the second token.
    """

    normal: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    gaps: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    handoff: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)


class MigrationBenchmark:
    """Measures on a started service.

    Args:
        places: The two instances between which requests move.
    """

    def __init__(self, service: InProcessService, places: tuple[str, str] = ("decode-0", "decode-1")) -> None:
        self._client = service.api.client
        self._frontend = service.api.frontend
        self._logs: dict[str, TokenLog] = {}
        self._places = places
        self._serial = 0
        self._frontend.tokens.observer = self._observe

    def _observe(self, request_id: str, instance: str, count: int, now: float) -> None:
        log = self._logs.setdefault(request_id, TokenLog())
        while len(log.times) < count:
            log.times.append(now)
            log.sources.append(instance)

    async def handoff(self, length: int, samples: LengthSamples) -> None:
        """One short request: the gap from its first to its second token is that of the hand-off."""
        begin = time.monotonic()
        name, generating = self._generate(length, max_tokens=8)
        request_id = await self._internal_id(name)
        await generating
        log = self._logs[request_id]
        samples.ttft.append((log.times[0] - begin) * 1e3)
        samples.handoff.append((log.times[1] - log.times[0]) * 1e3)

    async def moves(self, length: int, modes: Sequence[MigrationMode], samples: LengthSamples) -> None:
        """One long request, moved once in each mode in turn."""
        name, generating = self._generate(length, max_tokens=MAX_TOKENS)
        request_id = await self._internal_id(name)
        log = await self._tokens(request_id, 4)
        for mode in modes:
            begin = len(log.times)
            await self._tokens(request_id, begin + TOKENS_BETWEEN)
            here = log.sources[-1]
            there = self._places[here == self._places[0]]
            at, started = len(log.times), time.monotonic()
            # Without the first tokens after a move: they belong to a new batch.
            samples.normal += log.gaps_ms(begin + 3, at)
            migrated = await self._frontend.migrate(request_id, there, mode)
            samples.gaps[mode].append(migrated.downtime_ms)
            if mode == "live":
                samples.during += [
                    gap
                    for i in range(at, len(log.times))
                    if log.sources[i] == here and log.times[i - 1] >= started
                    for gap in log.gaps_ms(i, i + 1)
                ]
        await self._client.abort(name)
        await asyncio.gather(generating, return_exceptions=True)

    async def moves_together(self, number: int, length: int, moves: int, samples: LengthSamples) -> None:
        """Several long requests on one instance, which all move to the other one at the same time."""
        begun = [self._generate(length, max_tokens=MAX_TOKENS) for _ in range(number)]
        ids = [await self._internal_id(name) for name, _ in begun]
        logs = [await self._tokens(request_id, 4) for request_id in ids]
        here, there = self._places
        for request_id, log in zip(ids, logs, strict=True):
            if log.sources[-1] != here:
                await self._frontend.migrate(request_id, here)
        for _ in range(moves):
            begins = [len(log.times) for log in logs]
            for request_id, begin in zip(ids, begins, strict=True):
                await self._tokens(request_id, begin + TOKENS_BETWEEN)
            for log, begin in zip(logs, begins, strict=True):
                samples.normal += log.gaps_ms(begin + 3, begin + TOKENS_BETWEEN)
            migrated = await asyncio.gather(*(self._frontend.migrate(i, there) for i in ids))
            samples.gaps["live"] += [migration.downtime_ms for migration in migrated]
            here, there = there, here
        for name, _ in begun:
            await self._client.abort(name)
        await asyncio.gather(*(generating for _, generating in begun), return_exceptions=True)

    def _generate(self, length: int, max_tokens: int) -> tuple[str, "asyncio.Task[None]"]:
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._serial += 1
        prompt = TokensPrompt(prompt_token_ids=[(i * 31 + self._serial * 17) % 250 for i in range(length)])
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        name = f"bench-{self._serial}"

        async def run() -> None:
            async for _ in self._client.generate(prompt, params, name):
                pass

        return name, asyncio.ensure_future(run())

    async def _internal_id(self, name: str) -> str:
        while not (ids := self._client.internal_ids(name)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return str(ids[0])

    async def _tokens(self, request_id: str, count: int) -> TokenLog:
        """Waits until a request has `count` tokens.

        Raises:
            TimeoutError: The request has stopped.
        """
        async with asyncio.timeout(120):
            while True:
                log = self._logs.get(request_id)
                if log is not None and len(log.times) >= count:
                    return log
                await asyncio.sleep(0.002)


async def _measure(service: InProcessService, rounds: int, console: rich.console.Console) -> dict[str, Any]:
    bench = MigrationBenchmark(service)
    modes: list[MigrationMode] = ["live", "blocking", "live", "recompute", "live", "blocking", "live"]
    without_recompute = [mode for mode in modes if mode != "recompute"]
    results = {length: LengthSamples() for length in LENGTHS}
    together = LengthSamples()
    await bench.moves(LENGTHS[0], modes, LengthSamples())  # warm-up
    with new_progress(console) as progress:
        task = progress.add_task("measuring", total=rounds * (len(LENGTHS) + 1))
        for _ in range(rounds):
            for length, samples in results.items():
                progress.update(task, description=f"{length} tokens", refresh=True)
                await bench.handoff(length, samples)
                await bench.moves(length, modes if length <= MAX_RECOMPUTED else without_recompute, samples)
                progress.advance(task)
            progress.update(task, description=f"{TOGETHER} requests together", refresh=True)
            await bench.moves_together(TOGETHER, TOGETHER_LENGTH, TOGETHER_MOVES, together)
            progress.advance(task)
    problems = await service.api.frontend.check_integrity()
    if problems:
        raise PdServeError(f"the cluster violates an invariant after the benchmark: {problems}")
    rows = [_row(length, samples) for length, samples in results.items()]
    handoff = [_handoff_row(length, samples) for length, samples in results.items()]
    every_gap = {
        length: {mode: [round(gap, 2) for gap in gaps] for mode, gaps in samples.gaps.items()}
        for length, samples in results.items()
    }
    return {
        "rows": rows,
        "handoff": handoff,
        "together": _row(TOGETHER_LENGTH, together) | {"requests": TOGETHER},
        "verdict": _verdict(rows, handoff, together),
        "samples": every_gap | {"together": [round(gap, 2) for gap in together.gaps["live"]]},
    }


def _row(length: int, samples: LengthSamples) -> dict[str, Any]:
    during = median(samples.during) if samples.during else None
    return {
        "tokens": length,
        "itl_ms": round(median(samples.normal), 3),
        **{f"{mode}_ms": round(median(gaps), 3) for mode, gaps in samples.gaps.items() if gaps},
        "source_step_ratio": None if during is None else round(during / median(samples.normal), 3),
    }


def _handoff_row(length: int, samples: LengthSamples) -> dict[str, Any]:
    medians = {"gap": samples.handoff, "itl": samples.normal, "ttft": samples.ttft}
    return {"tokens": length} | {f"{name}_ms": round(median(values), 3) for name, values in medians.items()}


def _verdict(
    rows: list[dict[str, Any]], handoff: list[dict[str, Any]], together: LengthSamples
) -> dict[str, Any]:
    """The ratios that have targets; see docs/benchmarks.md."""
    ratios = [row["source_step_ratio"] for row in rows if row["source_step_ratio"] is not None]
    return {
        "worst_live_over_itl": round(max(row["live_ms"] / row["itl_ms"] for row in rows), 2),
        "live_longest_over_shortest": round(rows[-1]["live_ms"] / rows[0]["live_ms"], 2),
        "worst_handoff_over_itl": round(max(row["gap_ms"] / row["itl_ms"] for row in handoff), 2),
        "handoff_longest_over_shortest": round(handoff[-1]["gap_ms"] / handoff[0]["gap_ms"], 2),
        "source_step_ratio": round(median(ratios), 3) if ratios else None,
        "together_live_over_itl": round(median(together.gaps["live"]) / median(together.normal), 2),
    }


def _table(result: dict[str, Any]) -> Table:
    columns = ("tokens", "ITL", "live", "blocking copy", "recompute", "hand-off", "source step ratio")
    table = numbers_table("gap between two tokens of a moved request, ms (median)", *columns)
    for row, handoff in zip(result["rows"], result["handoff"], strict=True):
        keys = ("itl_ms", "live_ms", "blocking_ms", "recompute_ms")
        numbers = [row.get(key) for key in keys]
        shown = ["–" if number is None else f"{number:.1f}" for number in numbers]
        table.add_row(str(row["tokens"]), *shown, f"{handoff['gap_ms']:.1f}", str(row["source_step_ratio"]))
    table.caption = "\n".join(f"{name}: {value}" for name, value in result["verdict"].items())
    return table


async def run(report: BenchmarkReport, rounds: int) -> None:
    """Starts a cluster, measures, shows a table and writes the numbers. Takes about four minutes per round.

    Raises:
        PdServeError: The cluster did not start, or violates an invariant at the end.
    """
    tokens = max(LENGTHS) + MAX_TOKENS
    flags = (
        "--no-enable-prefix-caching",
        f"--max-num-seqs={TOGETHER}",
        f"--max-model-len={tokens}",
        f'--hf-overrides={{"max_position_embeddings": {tokens}}}',
        "--kv-cache-memory-bytes=1073741824",
    )
    config = ServeConfig(model="bench", prefill=1, decode=2, flags=flags)
    service = InProcessService(config)
    try:
        await service.start()
        result = await _measure(service, rounds, report.console)
    finally:
        await service.stop()
    report.show(_table(result))
    report.write(result)
