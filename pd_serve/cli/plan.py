"""`pd-serve plan`: the best layout of GPUs for a workload and a target."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pd_serve import setting_types
from pd_serve.config import DEFAULT_COST_MODEL
from pd_serve.errors import InvalidRequestError
from router.slo import Slo

if TYPE_CHECKING:
    from rich.table import Table

    from pd_serve.planning.fast_cluster import Layout
    from pd_serve.planning.search import Goal, LayoutPlan

#: Columns of the widest table.
LEAST_WIDTH = 110


def plan(
    trace: Annotated[
        str,
        typer.Option(
            help="Workload: s-s, m-m, l-l, s-l, l-s or burstgpt (generated), PROMPT:OUTPUT (all of that many"
            " tokens, such as 8000:1000), azure-conv, azure-code, mooncake or sharegpt (from a file), or the"
            " path of a trace file."
        ),
    ],
    slo: Annotated[
        str,
        typer.Option(
            metavar="ttft=TIME,itl=TIME",
            help="Target of a request: time to first token, and mean time per later token, such as"
            " ttft=500ms,itl=25ms. Without a unit: seconds.",
        ),
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to use.")],
    cost_model: Annotated[
        str,
        typer.Option(
            help="GPUs and model of an instance, such as h100x4-llama-3.1-70b, or a CSV file of measured"
            " steps."
        ),
    ] = DEFAULT_COST_MODEL,
    attainment: Annotated[
        float, typer.Option(min=0.01, max=1, help="Least share of the requests within the target.")
    ] = 0.9,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU for an hour, for the cost of tokens.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests/s that are expected. [default: as recorded, if so]")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=10, help="Requests of each run. [default: 2000, if there are]")
    ] = None,
    arrivals: Annotated[
        str | None, typer.Option(help="poisson, gamma:CV, sine:RATIO:PERIOD_S or recorded.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of lengths and arrivals.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per core]")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Folder of trace files.", envvar="PD_SERVE_TRACES")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(dir_okay=False, help="SVG file to write: attainment against the rate.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all numbers to this file.")
    ] = None,
) -> None:
    """Choose the layout of GPUs: aggregated with which chunk size, or how many prefill and decode instances.

    Each layout is simulated at several rates of requests. Its goodput is the greatest one at which enough
    requests are within the target.
    """
    from pd_serve.observe import provenance as report
    from pd_serve.planning import picture as drawing
    from pd_serve.planning.search import Goal
    from pd_serve.simulation.workloads import TraceSpec

    spec = TraceSpec(trace, rate, requests, arrivals, seed=seed)
    goal = Goal(parse_slo(slo), attainment)
    provenance = report.provenance()
    found, about = _measure(spec, traces, cost_model, gpus, goal, jobs)
    output_tokens = about["mean_output_tokens"]
    entries = [entry(one, gpus, output_tokens, gpu_hour_price) for one in found]
    title = f"{trace} on {gpus} GPUs, {cost_model}: {slo}"
    _show(found, entries, goal, title, about)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(drawing.svg(found, goal, title), encoding="utf-8")
    if json_file is not None:
        names = ("layout", "prefill", "decode", "neutral", "chunk")
        best = {name: entries[0][name] for name in names} if found[0].goodput else None
        asked = {"slo": {"ttft_s": goal.slo.ttft_s, "itl_s": goal.slo.tpot_s}, "attainment": attainment}
        report.write(
            json_file, {"best": best, "layouts": entries, **asked, "gpus": gpus, **about, **provenance}
        )


def parse_slo(text: str) -> Slo:
    """The target of a plan: both bounds; see `pd_serve.setting_types.parse_slo`.

    Raises:
        InvalidRequestError: The text is something else.
    """
    try:
        slo = setting_types.parse_slo(text)
    except ValueError as error:
        raise InvalidRequestError(f"--slo {error}") from None
    if math.inf in (slo.ttft_s, slo.tpot_s):
        raise InvalidRequestError(f"--slo {text}: both ttft and itl are needed, such as ttft=500ms,itl=25ms")
    return slo


def entry(
    plan: "LayoutPlan", gpus: int, output_tokens: float, gpu_hour_price: float | None
) -> dict[str, Any]:
    """A layout's numbers, for the JSON file. The cost is that of a million output tokens at the goodput."""
    layout = plan.layout
    hours = gpus / 3600 / (plan.goodput * output_tokens) * 1e6 if plan.goodput else None
    return {
        "layout": "pd" if layout.is_disaggregated else "aggregated",
        "prefill": layout.prefill,
        "decode": layout.decode,
        "neutral": layout.neutral,
        "chunk": layout.chunk_tokens,
        "goodput": plan.goodput,
        "goodput_per_gpu": plan.goodput / gpus,
        "ttft_p99_s": plan.ttft_s,
        "itl_p99_s": plan.tpot_s,
        "attainment_at_rate": plan.attainment,
        "gpu_hours_per_million_tokens": hours,
        "cost_per_million_tokens": (
            None if hours is None or gpu_hour_price is None else hours * gpu_hour_price
        ),
        "curve": [{"rate": rate, "attainment": share} for rate, share in plan.curve],
    }


def _measure(
    spec: Any, traces: Path | None, cost_model: str, gpus: int, goal: "Goal", jobs: int | None
) -> tuple[list["LayoutPlan"], dict[str, Any]]:
    """The plan, and what was measured: requests, tokens, rate."""
    import rich.console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pd_serve.planning.search import plan as search
    from pd_serve.planning.workload import planned_workload
    from pd_serve.simulated_engine.hardware import hardware

    machine = hardware(cost_model)
    workload, about = planned_workload(spec, machine, traces)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = rich.console.Console(stderr=True, highlight=False)
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("layouts", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = search(workload, machine, gpus, goal, rate=about["rate"], jobs=jobs, on_progress=show)
    more = {"gpus_per_instance": machine.num_gpus, "assumed": list(machine.unknown)}
    return found, about | {"cost_model": cost_model} | more


def _show(
    plans: list["LayoutPlan"], entries: list[dict[str, Any]], goal: "Goal", title: str, about: dict[str, Any]
) -> None:
    import rich.console

    console = rich.console.Console(highlight=False, soft_wrap=True)
    # Lines are cut by the terminal, not here: in a file or a narrow terminal nothing is missing.
    console.width = max(console.width, LEAST_WIDTH)
    console.print(_table(plans, entries, title, about["rate"]))
    if about["left_out"]:
        console.print(f"left out: {about['left_out']} requests longer than an instance's memory")
    if about["assumed"]:
        console.print(f"assumed: the paper's {', '.join(about['assumed'])}, as the cost model has none")
    best = plans[0]
    if not best.goodput:
        console.print(
            f"[bold]no layout[/] keeps {goal.attainment:.0%} of the requests within the target, at any rate"
        )
        return
    flags = serve_flags(best.layout, about["gpus_per_instance"])
    console.print(
        f"[bold]best[/]  {best.layout}: {best.goodput:.3g} requests/s; pd-serve serve MODEL {flags}"
    )


def serve_flags(layout: "Layout", gpus_per_instance: int) -> str:
    """The flags of `pd-serve serve` for a layout; none for its chunks if it has none."""
    sizes, role = f"--neutral {layout.neutral}", ""
    if layout.is_disaggregated:
        sizes, role = f"--prefill {layout.prefill} --decode {layout.decode}", "prefill-"
    if layout.chunk_tokens is not None:
        sizes += f" --{role}max-num-batched-tokens {layout.chunk_tokens}"
    return sizes + (f" --tensor-parallel-size {gpus_per_instance}" if gpus_per_instance > 1 else "")


def _table(
    plans: list["LayoutPlan"], entries: list[dict[str, Any]], title: str, rate: float | None
) -> "Table":
    from rich.table import Table

    priced = any(one["cost_per_million_tokens"] is not None for one in entries)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("layout", no_wrap=True)
    columns = ["goodput/s", "TTFT P99, s", "ITL P99, ms", "GPU h/M"]
    columns += ["cost/M"] * priced + ([f"at {rate:.3g}/s"] if rate else [])
    for column in columns:
        table.add_column(column, justify="right")
    for one, numbers in zip(plans, entries, strict=True):
        ttft, itl, hours = (
            numbers[name] for name in ("ttft_p99_s", "itl_p99_s", "gpu_hours_per_million_tokens")
        )
        cells = [
            f"{one.goodput:.3g}",
            "–" if ttft is None else f"{ttft:.3g}",
            "–" if itl is None else f"{itl * 1e3:.3g}",
            "–" if hours is None else f"{hours:.3g}",
        ]
        if priced:
            cost = numbers["cost_per_million_tokens"]
            cells.append("–" if cost is None else f"{cost:.3g}")
        if rate:
            cells.append(f"{one.attainment or 0:.1%}")
        table.add_row(str(one.layout), *cells)
    return table
