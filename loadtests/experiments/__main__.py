"""Experiments in virtual time: `python -m loadtests.experiments paper`, and so on.

Modules that take time to import are imported when a command runs.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pd_serve.errors import InvalidRequestError, PdServeError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Experiments in virtual time, with the real control plane.",
)

OutFolder = Annotated[Path, typer.Option("--out", help="Folder for tables, plots and results.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests per simulation.")]
Seed = Annotated[int, typer.Option(help="Seed of lengths, arrivals and everything random.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Number of processes. (default: one per core)")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what has a result in the folder.")]
TracesFolder = Annotated[
    Path | None, typer.Option("--traces", help="Folder of trace files.", envvar="PD_SERVE_TRACES")
]


@app.command()
def paper(
    out: OutFolder,
    figure: Annotated[
        list[int] | None, typer.Option(help="10 to 16; may be given several times. (default: all)")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The paper's points as JSON. (default: the project's own file)")
    ] = None,
    requests: Requests = 10_000,
    rates: Annotated[
        str, typer.Option(help="Points of each curve: all, first, last, or first,last.")
    ] = "all",
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    traces: TracesFolder = None,
) -> None:
    """Run the experiments of the Llumnix paper; write tables and plots beside the paper's points."""
    from loadtests.experiments.figure import FigureOptions
    from loadtests.experiments.paper.all_figures import run_paper
    from loadtests.experiments.result_store import ExperimentRun

    options = FigureOptions.parse(requests, rates, seed, reference)
    run_paper(figure or [], options, ExperimentRun(out, jobs, traces, fresh))


@app.command()
def arms(
    out: OutFolder,
    requests: Requests = 10_000,
    slo_ttft: Annotated[float, typer.Option(help="Limit of the time to first token, in seconds.")] = 5.0,
    slo_tpot: Annotated[float, typer.Option(help="Limit of the mean time per later token.")] = 0.1,
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    traces: TracesFolder = None,
) -> None:
    """Compare 16 instances with and without disaggregation, rescheduling, de-fragmentation and priorities."""
    from loadtests.experiments.arms import run_arms
    from loadtests.experiments.figure import FigureOptions
    from loadtests.experiments.result_store import ExperimentRun
    from router.slo import Slo

    options = FigureOptions(requests, seed=seed)
    run_arms(options, Slo(slo_ttft, slo_tpot), ExperimentRun(out, jobs, traces, fresh))


@app.command()
def policies(
    out: OutFolder,
    requests: Requests = 10_000,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Compare our defaults with this setting, too."),
    ] = None,
    jobs: Jobs = None,
    fresh: Fresh = False,
) -> None:
    """Compare the steps from the paper's Llumnix to our defaults, on several traces and seeds."""
    from loadtests.experiments.figure import FigureOptions
    from loadtests.experiments.policies import run_policies
    from loadtests.experiments.result_store import ExperimentRun
    from pd_serve.setting_types import parse_settings

    candidate = parse_settings(settings or [])
    run_policies(FigureOptions(requests), range(seeds), ExperimentRun(out, jobs, fresh=fresh), candidate)


@app.command()
def sine(
    out: OutFolder,
    share: Annotated[
        float, typer.Option(max=1, help="Of the rate, and so of the requests and of the CPU time.")
    ] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    arm: Annotated[
        list[str] | None, typer.Option(help="An autoscaled cluster; may be repeated. (default: all)")
    ] = None,
    jobs: Jobs = None,
    fresh: Fresh = False,
) -> None:
    """Compare autoscaling with the best fixed layout, under a rate from 1 to 24 requests/s and back."""
    from loadtests.experiments.result_store import ExperimentRun
    from loadtests.experiments.sine import ARMS, SineOptions, run_sine

    if not share > 0:
        raise InvalidRequestError(f"--share {share}: must be above 0")
    if unknown := [title for title in arm or [] if title not in ARMS]:
        raise InvalidRequestError(f"no cluster {unknown[0]!r}; there are {'; '.join(ARMS)}")
    options = SineOptions(seeds, share, tuple(arm or ARMS))
    run_sine(options, ExperimentRun(out, jobs, fresh=fresh))


@app.command()
def turns(
    out: OutFolder,
    seconds: Annotated[float, typer.Option(min=1, help="Of arrivals, per simulation.")] = 30.0,
    rates: Annotated[str, typer.Option(help="Of the five rates: all, first, last, or first,last.")] = "all",
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
) -> None:
    """Compare layouts of four instances on nine kinds of second turns of conversations."""
    from loadtests.experiments.figure import FigureOptions
    from loadtests.experiments.result_store import ExperimentRun
    from loadtests.experiments.turns import RATES, run_turns

    options = FigureOptions.parse(round(seconds * RATES[-1]), rates, seed, None)
    run_turns(options, seconds, ExperimentRun(out, jobs, fresh=fresh))


@app.command()
def immovable(
    out: OutFolder,
    requests: Requests = 400,
    rates: Annotated[str, typer.Option(help="Of the four rates: all, first, last, or first,last.")] = "all",
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
) -> None:
    """Compare uses of engines that cannot move requests: neutral, and PD with and without recompute."""
    from loadtests.experiments.figure import FigureOptions
    from loadtests.experiments.immovable import run_immovable
    from loadtests.experiments.result_store import ExperimentRun

    run_immovable(FigureOptions.parse(requests, rates, seed, None), ExperimentRun(out, jobs, fresh=fresh))


@app.command()
def layouts(
    out: OutFolder,
    requests: Annotated[int, typer.Option(min=10, help="Requests per run.")] = 4000,
    cost_model: Annotated[
        list[str] | None, typer.Option(help="Hardware and model; may be repeated. (default: all three)")
    ] = None,
    jobs: Jobs = None,
    fresh: Fresh = False,
    traces: TracesFolder = None,
) -> None:
    """Compare the best layouts with and without disaggregation, by hardware, workload and target."""
    from loadtests.experiments.layouts import HARDWARE, run_layouts
    from loadtests.experiments.result_store import ExperimentRun

    if unknown := [name for name in cost_model or [] if name not in HARDWARE]:
        raise InvalidRequestError(f"no hardware {unknown[0]!r}; there are {', '.join(HARDWARE)}")
    run_layouts(requests, ExperimentRun(out, jobs, traces, fresh), cost_model or [])


def main() -> None:
    """Runs a command. An expected error is one line, and exit code 1 or 2."""
    try:
        app()
    except PdServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidRequestError) else 1)


if __name__ == "__main__":
    main()
