"""`bench step`: the engine's step in an instance's process against that of vLLM's engine core.

Ours is the process of an instance as in service: a migrating scheduler in the step loop, the llumlet on its
event loop with ZeroMQ, the transport's reader; this process plays manager, scheduler and API server. vLLM's
is its `EngineCoreProc` with its own busy loop and output thread. Model, settings, requests and environment
are the same. In a round both decode

- at rest: 256 short requests. The two take turns of some steps, and each is alone while it decodes;
- while 8 long requests arrive: the same batch. They come from another instance of ours, which decodes them;
- while these leave: the batch and the 8 requests, whose blocks the other instance reads.

Ours moves them; in vLLM's they are set aside, and put back for the last part. Only steps count in which the
whole batch decodes, and while they move, steps until the batch has changed.
"""

import asyncio
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from loadtests.bench.report import BenchmarkReport
from loadtests.bench.step_arms import MOVED_PROMPT_TOKENS, OURS, STEPS, STOCK, OurEngines, StockEngine
from loadtests.bench.step_clock import RecordedStep
from loadtests.terminal import new_progress, numbers_table
from pd_serve.comm.wire import CurveKeys
from pd_serve.config import ServeConfig
from pd_serve.launch.preparation import find_model, parse

MODEL = "tiny"
FLAGS = ("--no-enable-prefix-caching", "--max-num-seqs=280", "--max-num-batched-tokens=4096")

#: Turns at rest in a round.
TURNS = 6

REST, ARRIVING, LEAVING = "at rest", "8 arrive", "8 leave"
#: Targets: ours ÷ vLLM's.
MAX_RATIO = {REST: 1.02, ARRIVING: 1.05, LEAVING: 1.05}

#: Steps of one round, by part.
RoundSteps = dict[str, list[RecordedStep]]


async def run(report: BenchmarkReport, rounds: int) -> None:
    """Measures, shows a table and writes the numbers. Takes about 2 minutes with 10 rounds on two cores.

    Raises:
        PdServeError: An engine did not start, or a request did not move.
    """
    config = ServeConfig(model=MODEL, prefill=0, decode=0, neutral=2, flags=FLAGS)
    source = await asyncio.to_thread(find_model, config)
    prepared = await asyncio.to_thread(parse, config, source)
    arguments = prepared.flags.engine("neutral")
    measured: dict[str, list[RoundSteps]] = {OURS: [], STOCK: []}
    ours = OurEngines(arguments, prepared.manager_config("", CurveKeys.generate()).stage_bytes_per_s)
    stock = StockEngine(arguments)
    try:
        with report.console.status("starting three engines"):
            await asyncio.gather(ours.start(), stock.start())
        with new_progress(report.console) as progress:
            task = progress.add_task("measuring", total=rounds + 1)
            for number in range(rounds + 1):
                steps = await _round(ours, stock, number)
                for name, parts in steps.items():
                    if number:  # the first one is for warm-up
                        measured[name].append(parts)
                progress.advance(task)
    finally:
        await asyncio.gather(ours.stop(), stock.stop())
    result = summary(measured)
    report.show(_table(result))
    numbers = {"flags": FLAGS, "environment": source.environment, "moved_prompt_tokens": MOVED_PROMPT_TOKENS}
    every_ms = {
        arm: [
            {part: [round(step.ms, 2) for step in steps] for part, steps in parts.items()} for parts in rounds
        ]
        for arm, rounds in measured.items()
    }
    report.write(result | numbers | {"every_ms": every_ms})


async def _round(ours: OurEngines, stock: StockEngine, number: int) -> dict[str, RoundSteps]:
    arms: tuple[OurEngines | StockEngine, ...] = (ours, stock)
    measured: dict[str, RoundSteps] = {arm.name: {REST: []} for arm in arms}
    for arm in arms:
        await arm.begin(number)
    for turn in range(TURNS):
        for arm in arms if turn % 2 else arms[::-1]:
            measured[arm.name][REST] += await arm.decode(STEPS)
    for arm in arms:
        measured[arm.name][ARRIVING] = await arm.arrive()
    for arm in arms:
        measured[arm.name][LEAVING] = await arm.leave()
    for arm in arms:
        await arm.end()
    return measured


def summary(measured: dict[str, list[RoundSteps]]) -> dict[str, Any]:
    """Medians and ratios, by part.

    Ratios are those of the medians of one round, and the median over the rounds.
    """
    parts: dict[str, dict[str, Any]] = {}
    for part, most in MAX_RATIO.items():
        by_arm = {arm: [of_round[part] for of_round in rounds] for arm, rounds in measured.items()}
        row: dict[str, Any] = {"target": most}
        for number in ("ms", "thread_ms", "process_ms"):
            medians = {arm: [_median(steps, number) for steps in rounds] for arm, rounds in by_arm.items()}
            ratios = [a / b for a, b in zip(medians[OURS], medians[STOCK], strict=True)]
            row[number] = {arm: round(statistics.median(values), 3) for arm, values in medians.items()}
            row[number] |= {
                "ratio": round(statistics.median(ratios), 4),
                "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
            }
        row["steps"] = {arm: sum(map(len, rounds)) for arm, rounds in by_arm.items()}
        parts[part] = row
    return {"parts": parts}


def _median(steps: Sequence[RecordedStep], number: str) -> float:
    return float(statistics.median(getattr(step, number) for step in steps))


def _table(result: dict[str, Any]) -> Table:
    columns = ["steps", "ms", "vLLM's", "ratio", "target"]
    columns += ["thread CPU ms", "vLLM's", "ratio", "process CPU ratio"]
    table = numbers_table("the engine's step, medians", "", *columns, labels=1)
    for part, row in result["parts"].items():
        ms, cpu = row["ms"], row["thread_ms"]
        colour = "green" if ms["ratio"] <= row["target"] else "red"
        table.add_row(
            part,
            f"{row['steps'][OURS]} / {row['steps'][STOCK]}",
            f"{ms[OURS]:.2f}",
            f"{ms[STOCK]:.2f}",
            f"[{colour}]{ms['ratio']:.3f}[/]",
            f"{row['target']}",
            f"{cpu[OURS]:.2f}",
            f"{cpu[STOCK]:.2f}",
            f"{cpu['ratio']:.3f}",
            f"{row['process_ms']['ratio']:.3f}",
        )
    return table
