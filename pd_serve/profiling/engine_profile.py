"""`pd-serve bench profile`: how long the steps of a real engine take on this machine, as a cost model.

The engine is that of an instance, in this process and without Ray. Rounds over all kinds of steps follow each
other until the time is up, so that a slow moment of the machine affects all kinds alike; every figure is a
median over the rounds. All prompts are different, so that nothing is found in the prefix cache.
"""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pd_serve.config import ServeConfig
from pd_serve.errors import PdServeError
from pd_serve.launch.preparation import find_model, parse
from pd_serve.launch.signals import end_on
from pd_serve.observe import provenance as report
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import (
    FITTED,
    PHASES,
    Point,
    Row,
    StepSeen,
    points,
    relative_errors,
    rows,
    samples,
    write_csv,
)
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import LinearCostModel

#: Points per phase that are measured in any case: a fit to fewer would be a fit to noise.
MIN_POINTS = 5

#: Prompt steps per visit of a point; a visit of a decode point has many steps anyway.
PROMPTS_PER_ROUND = 3


async def run(
    model: str,
    out: Path,
    engine_flags: list[str],
    *,
    json_path: Path | None = None,
    num_instances: int = 1,
    seconds: float = 60.0,
) -> None:
    """Measures, shows a table and writes the CSV file.

    Args:
        num_instances: Instances that will share the machine: the engine gets its share of the cores.
        seconds: Time to measure, after the engine's start.

    Raises:
        PdServeError: The engine does not start, or was stopped.
    """
    end_on(signal.SIGTERM)
    provenance = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"starting an engine with {model}"):
        engine = await start_engine(model, engine_flags, num_instances)
    try:
        measured = await _measure_with_progress(engine, seconds, console)
        about = engine.about
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: nothing was written") from None
    finally:
        await engine.close()
    table = rows(measured)
    write_csv(out, table, sizes(about))
    fitted = cost_table.read(out)
    errors = relative_errors(table, fitted)
    console.print(_table(table, fitted))
    for phase, coefficients, terms in (
        ("prefill", fitted.prefill_ms, ("", " n", " n²")),
        ("decode", fitted.decode_ms, ("", " batch", " context")),
    ):
        formula = " + ".join(f"{value:.3g}{term}" for value, term in zip(coefficients, terms, strict=True))
        if (error := errors.get(phase)) is None:
            continue
        console.print(f"{phase:<8} {formula} ms (off by {error['median']:.1%}, at most {error['max']:.1%})")
    if (error := errors.get("mixed")) is not None:
        console.print(
            f"mixed    both, with a constant of {fitted.mixed_ms:.3g} ms "
            f"(off by {error['median']:.1%}, at most {error['max']:.1%})"
        )
    console.print(f"written to {out}")
    if json_path is not None:
        result = {"model": model, "engine": about, "fit": asdict(fitted), "relative_error": errors}
        report.write(json_path, result | {"rows": [asdict(row) for row in table]} | provenance)


def sizes(about: Mapping[str, int]) -> dict[str, float]:
    """What a cost model says of an engine besides its steps. Links and the start are not measured."""
    return {
        name: about["max_num_batched_tokens" if name == "chunk_tokens" else name]
        for name in cost_table.ENGINE_SIZES
    }


async def start_engine(model: str, engine_flags: Sequence[str], num_instances: int = 1) -> MeasuredEngine:
    """An engine as that of an instance of `pd-serve serve`; sets the environment that it needs.

    Raises:
        InvalidRequestError: A flag is not vLLM's, or vLLM refuses it.
    """
    config = ServeConfig(model=model, prefill=0, decode=0, neutral=num_instances, flags=tuple(engine_flags))
    source = await asyncio.to_thread(find_model, config)
    prepared = await asyncio.to_thread(parse, config, source)
    engine = MeasuredEngine(prepared.flags.engine("neutral"), int(source.environment["OMP_NUM_THREADS"]))
    await engine.start()
    return engine


async def measure(
    engine: MeasuredEngine,
    wanted: Sequence[Point],
    seconds: float,
    on_point: Callable[[Point], None] = lambda point: None,
) -> dict[Point, list[StepSeen]]:
    """Measures rounds over all points until the time is up; a slow engine may not reach all of them.

    Args:
        engine: Has started.
        wanted: In the order of their length.
    """
    dice = random.Random("profile")
    for phase in PHASES:  # threads, memory and caches get warm
        for point in [point for point in wanted if point.phase == phase][:1]:
            await engine.steps(point, dice)
    measured: dict[Point, list[StepSeen]] = {point: [] for point in wanted}
    deadline = time.monotonic() + seconds
    least = min(MIN_POINTS, len(wanted) // 2)
    while True:
        for point in wanted:
            done = [sum(p.phase == phase for p, steps in measured.items() if steps) for phase in FITTED]
            if time.monotonic() > deadline and min(done) >= least:
                return measured
            on_point(point)
            for _ in range(PROMPTS_PER_ROUND if point.phase == "prefill" else 1):
                measured[point] += samples(point, await engine.steps(point, dice))


async def _measure_with_progress(
    engine: MeasuredEngine, seconds: float, console: rich.console.Console
) -> dict[Point, list[StepSeen]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawn between points only, so that it does not compete with what is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("measuring", total=seconds)
        began = time.monotonic()

        def show(point: Point) -> None:
            text = f"{point.phase} {point.batch_size} × {point.tokens}"
            done = min(time.monotonic() - began, seconds)
            progress.update(task, description=f"{text:<16}", completed=done, refresh=True)

        return await measure(engine, points(engine.limits), seconds, show)


def _table(table: Sequence[Row], fitted: LinearCostModel) -> Table:
    shown = Table("step", title="median time of a step, ms", title_justify="left")
    for column in ("batch", "new tokens", "context", "measured", "fitted", "error"):
        shown.add_column(column, justify="right")
    for row in table:
        ms = row.model_ms(fitted)
        new = row.new_tokens if row.phase == "mixed" else row.batch_size * row.new_tokens
        numbers = (row.batch_size, new, row.context_tokens)
        shown.add_row(row.phase, *map(str, numbers), f"{row.ms:.2f}", f"{ms:.2f}", f"{ms / row.ms - 1:+.1%}")
    return shown
