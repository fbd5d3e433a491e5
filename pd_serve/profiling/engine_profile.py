"""`pd-serve bench profile`: how long the steps of a real engine take on this machine, as a cost model.

The engine is an instance's, in this process and without Ray. Rounds over all kinds of steps follow each
other until the time is up, so that a slow moment of the machine hits all kinds alike; every figure is a
median over the rounds. All prompts are different, so nothing is found in the prefix cache.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pd_serve import models
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on_sigterm
from pd_serve.observe import provenance as report
from pd_serve.platform.cpu import cpu_engine_defaults, is_cpu_build
from pd_serve.platform.environment import engine_environment
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import (
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

#: For a first round: less would be a fit through noise.
MIN_POINTS = 5

#: A visit has one step over prompts, and many decode steps.
PROMPTS_PER_ROUND = 3

OnPoint = Callable[[Point], None]


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
        num_instances: Instances that are to share the machine: each computes with its share of the cores.
        seconds: Time to measure; the engine's start comes on top.

    Raises:
        PdServeError: The engine does not start, or was stopped.
    """
    end_on_sigterm()
    provenance = report.provenance()
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"starting an engine with {model}"):
        engine = await start_engine(model, engine_flags, num_instances)
    try:
        measured = await _measure_and_show(engine, seconds, console)
        about = engine.about
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: nothing was written") from None
    finally:
        await engine.close()
    table = rows(measured)
    write_csv(out, table)
    fitted = cost_table.read(out)
    errors = relative_errors(table, fitted)
    console.print(_table(table, fitted))
    console.print(_fit_line(fitted, errors))
    console.print(f"written to {out}")
    if json_path is not None:
        result = {
            "model": model,
            "engine": about,
            "fit": asdict(fitted),
            "relative_error": errors,
            "rows": [asdict(row) for row in table],
        }
        report.write(json_path, result | provenance)


async def start_engine(model: str, engine_flags: Sequence[str], num_instances: int = 1) -> MeasuredEngine:
    """An engine as an instance of `pd-serve serve`, and the environment that this takes.

    Raises:
        InvalidRequestError: A flag is not vLLM's, or vLLM refuses it.
    """
    path = await asyncio.to_thread(models.resolve, model)
    environment = engine_environment(num_instances, path)
    os.environ.update(environment)
    from pd_serve.launch.engine_flags import parse

    defaults: dict[str, Any] = {"model": path, "served_model_name": [models.served_name(model)]}
    if (dtype := models.default_dtype(model)) is not None:
        defaults["dtype"] = dtype
    if is_cpu_build():
        defaults |= cpu_engine_defaults()
    flags = await asyncio.to_thread(parse, list(engine_flags), defaults)
    engine = MeasuredEngine(flags.engine("neutral"), int(environment["OMP_NUM_THREADS"]))
    await engine.start()
    return engine


async def measure(
    engine: MeasuredEngine, wanted: Sequence[Point], seconds: float, on_point: OnPoint = lambda point: None
) -> dict[Point, list[StepSeen]]:
    """Rounds over all points until the time is up; what the engine is too slow for is left out.

    Args:
        engine: Has started.
        wanted: In the order of their length.
    """
    dice = random.Random("profile")
    for phase in PHASES:  # threads, memory and caches get warm
        await engine.steps(next(point for point in wanted if point.phase == phase), dice)
    measured: dict[Point, list[StepSeen]] = {point: [] for point in wanted}
    deadline = time.monotonic() + seconds
    while True:
        for point in wanted:
            found = {
                phase: sum(p.phase == phase for p, steps in measured.items() if steps) for phase in PHASES
            }
            if time.monotonic() > deadline and min(found.values()) >= min(MIN_POINTS, len(wanted) // 2):
                return measured
            on_point(point)
            for _ in range(PROMPTS_PER_ROUND if point.phase == "prefill" else 1):
                measured[point] += samples(point, await engine.steps(point, dice))


async def _measure_and_show(
    engine: MeasuredEngine, seconds: float, console: rich.console.Console
) -> dict[Point, list[StepSeen]]:
    wanted = points(engine.limits)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawn between points only: it must not compete with what is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("measuring", total=seconds)
        began = time.monotonic()

        def tell(point: Point) -> None:
            text = f"{point.phase} {point.batch_size} × {point.tokens}"
            done = min(time.monotonic() - began, seconds)
            progress.update(task, description=f"{text:<16}", completed=done, refresh=True)

        return await measure(engine, wanted, seconds, tell)


def _table(table: Sequence[Row], fitted: LinearCostModel) -> Table:
    shown = Table("step", title="median time of a step, ms", title_justify="left")
    for column in ("batch", "new tokens", "context", "measured", "fitted", "error"):
        shown.add_column(column, justify="right")
    for row in table:
        model_ms = row.model_ms(fitted)
        shown.add_row(
            row.phase,
            str(row.batch_size),
            str(row.batch_size * row.new_tokens),
            str(row.context_tokens),
            f"{row.ms:.2f}",
            f"{model_ms:.2f}",
            f"{model_ms / row.ms - 1:+.1%}",
        )
    return shown


def _fit_line(fitted: LinearCostModel, errors: dict[str, dict[str, float]]) -> str:
    (p0, p1, p2), (d0, d1, d2) = fitted.prefill_ms, fitted.decode_ms
    off = {
        phase: f"off by {error['median']:.1%}, at most {error['max']:.1%}" for phase, error in errors.items()
    }
    return (
        f"prefill  {p0:.3g} + {p1:.3g} n + {p2:.3g} n² ms ({off['prefill']})\n"
        f"decode   {d0:.3g} + {d1:.3g} batch + {d2:.3g} context ms ({off['decode']})"
    )
