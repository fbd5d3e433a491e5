"""`bench links`: how much of a link the data plane fills, on shared memory here.

One process owns the blocks, and this one reads them in several ways (see `link_arms`), in turns: at rest, and
beside a thread that is busy as the step thread of an engine. In a turn the same blocks are read again and
again for a while.
"""

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.bench.busy_steps import BusySteps
from loadtests.bench.link_arms import MEMCPY, NIXL, OURS, PACED, LinkArm, Memcpy, NixlAlone, OurTransport
from loadtests.bench.link_memory import BlockOwner, CacheLayout, CacheMemory
from loadtests.bench.report import BenchmarkReport
from loadtests.terminal import new_progress, numbers_table
from migration.transport.nixl import SWITCH_INTERVAL_S, NixlTransport
from pd_serve.errors import PdServeError
from pd_serve.platform.cpu import CPU_STAGE_BYTES_PER_S

#: Target: GB/s of ours ÷ NIXL's alone, beside busy steps.
MIN_RATIO = 0.8

#: Of the models `tiny` (K and V apart, blocks of 32 tokens) and Llama-3.1-8B (bfloat16, blocks of 16).
LAYOUTS = (CacheLayout("tiny", 8, 16 << 10, 2048), CacheLayout("8B", 32, 64 << 10, 128))
SIZES_MIB = (1, 16, 128)
ARMS = (MEMCPY, NIXL, OURS, PACED)
REST, BUSY = "at rest", "busy steps"

#: Time of a turn, in seconds: some steps.
TURN_S = 0.12


@dataclass(frozen=True, slots=True)
class LinkTurn:
    """What one way has done in one turn.

    Attributes:
        gb_per_s: 1e9 bytes per second.
        steps_ms: Durations of the steps that ended in it.
    """

    gb_per_s: float
    steps_ms: list[float]


#: All turns of one size of one layout, by REST or BUSY and by arm, in the order of the rounds.
Turns = dict[str, dict[str, list[LinkTurn]]]


async def run(
    report: BenchmarkReport,
    rounds: int,
    *,
    layouts: Sequence[CacheLayout] = LAYOUTS,
    sizes_mib: Sequence[int] = SIZES_MIB,
    turn_s: float = TURN_S,
) -> None:
    """Measures, shows a table and writes the numbers. Takes about 90 s with 11 rounds.

    Args:
        turn_s: Least time of a turn, in seconds. It has one read at least.

    Raises:
        PdServeError: A read failed, or what it copied is wrong.
    """
    rows: list[dict[str, Any]] = []
    with _switch_interval(SWITCH_INTERVAL_S), BusySteps() as steps:
        for layout in layouts:
            async with BlockOwner(layout) as owner:
                rows += await _measure_layout(report, rounds, layout, owner, steps, sizes_mib, turn_s)
    table = numbers_table(
        "reads through shared memory, GB/s, and the median step beside them, ms",
        *("blocks of", "MiB", "", *ARMS, f"{OURS} ÷ NIXL", *(f"step: {arm}" for arm in ARMS[1:])),
        labels=1,
    )
    for row in rows:
        for when in (REST, BUSY):
            table.add_row(*_cells(row, when))
    table.caption = (
        f"medians of {rounds} rounds; paced at {CPU_STAGE_BYTES_PER_S / 1e9} GB/s; "
        f"target: ours ÷ NIXL at least {MIN_RATIO} beside busy steps"
    )
    report.show(table)
    report.write({"target": MIN_RATIO, "paced_at_bytes_per_s": CPU_STAGE_BYTES_PER_S, "rows": rows})


def summary(turns: Turns) -> dict[str, Any]:
    """Medians over the rounds, the medians of the rounds' ratios, and all samples.

    Args:
        turns: As many turns of each arm as there were rounds.
    """
    return {
        when: {
            "gb_per_s": {arm: _median([turn.gb_per_s for turn in of]) for arm, of in arms.items()},
            "ratio_to_nixl": {arm: _ratio(of, arms[NIXL]) for arm, of in arms.items()},
            "ratio_to_memcpy": {arm: _ratio(of, arms[MEMCPY]) for arm, of in arms.items()},
            "step_ms": {arm: _step_ms(of) for arm, of in arms.items()},
            "samples": {arm: [round(turn.gb_per_s, 3) for turn in of] for arm, of in arms.items()},
        }
        for when, arms in turns.items()
    }


async def _measure_layout(
    report: BenchmarkReport,
    rounds: int,
    layout: CacheLayout,
    owner: BlockOwner,
    steps: BusySteps,
    sizes_mib: Sequence[int],
    turn_s: float,
) -> list[dict[str, Any]]:
    local, source = CacheMemory(layout), CacheMemory(layout)
    source.fill()
    transport = NixlTransport("reader")
    transport.register(local.kv_regions)
    paced = CPU_STAGE_BYTES_PER_S
    arms: dict[str, LinkArm] = {
        MEMCPY: Memcpy(source, local),
        NIXL: NixlAlone(owner, local),
        OURS: OurTransport(transport, owner, layout.block_bytes),
        PACED: OurTransport(transport, owner, layout.block_bytes, paced),
    }
    rows, dice = [], random.Random(0)
    try:
        for size_mib in sizes_mib:
            number = max(1, (size_mib << 20) // layout.block_bytes)
            remote = sorted(dice.sample(range(layout.blocks), number))
            blocks = dice.sample(range(layout.blocks), number)
            for name, arm in arms.items():
                arm.choose(remote, blocks)
                await _check(name, arm, local, remote, blocks)
            turns: Turns = {when: {arm: [] for arm in arms} for when in (REST, BUSY)}
            with new_progress(report.console, auto_refresh=True) as progress:
                for index in progress.track(range(rounds), description=f"{layout.name}, {size_mib} MiB"):
                    await _round(index, arms, number * layout.block_bytes, turns, steps, turn_s)
            about = {"layout": layout.name, "regions": layout.regions, "row_bytes": layout.row_bytes}
            rows.append(about | {"mib": number * layout.block_bytes / 2**20, **summary(turns)})
    finally:
        for arm in arms.values():
            arm.close()
    return rows


async def _check(
    name: str, arm: LinkArm, local: CacheMemory, remote: Sequence[int], blocks: Sequence[int]
) -> None:
    local.rows[:] = 0
    await arm.read()
    if not local.holds(remote, blocks):
        raise PdServeError(f"{name}: the blocks are not those of their owner")


async def _round(
    index: int, arms: dict[str, LinkArm], num_bytes: int, turns: Turns, steps: BusySteps, turn_s: float
) -> None:
    """One turn of each arm at rest and one beside busy steps; another arm begins in each round."""
    names = list(arms)
    first = index % len(names)
    for when in (REST, BUSY):
        for name in names[first:] + names[:first]:
            if when == BUSY:
                steps.go()
            gb_per_s = await _read_for(arms[name], num_bytes, turn_s)
            turns[when][name].append(LinkTurn(gb_per_s, steps.take()))
            steps.rest()
            steps.take()  # the last step, which was alone in the end


async def _read_for(arm: LinkArm, num_bytes: int, turn_s: float) -> float:
    """GB/s of reads of this many bytes, one after the other, for a while."""
    began, reads = time.perf_counter(), 0
    while reads == 0 or time.perf_counter() - began < turn_s:
        await arm.read()
        reads += 1
    return reads * num_bytes / (time.perf_counter() - began) / 1e9


def _cells(row: dict[str, Any], when: str) -> list[str]:
    of = row[when]
    ratio = of["ratio_to_nixl"][OURS]
    colour = "green" if ratio >= MIN_RATIO else "red"
    return [
        row["layout"],
        f"{row['mib']:g}",
        when,
        *(f"{of['gb_per_s'][arm]:.2f}" for arm in ARMS),
        f"[{colour}]{ratio:.2f}[/]" if when == BUSY else f"{ratio:.2f}",
        *("" if ms is None else f"{ms:.1f}" for ms in (of["step_ms"][arm] for arm in ARMS[1:])),
    ]


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _step_ms(turns: Sequence[LinkTurn]) -> float | None:
    """The median over all steps; None if there were none."""
    steps_ms = [step_ms for turn in turns for step_ms in turn.steps_ms]
    return _median(steps_ms) if steps_ms else None


def _ratio(turns: Sequence[LinkTurn], others: Sequence[LinkTurn]) -> float:
    return _median([turn.gb_per_s / other.gb_per_s for turn, other in zip(turns, others, strict=True)])


@contextlib.contextmanager
def _switch_interval(seconds: float) -> Iterator[None]:
    """That of an instance's process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
