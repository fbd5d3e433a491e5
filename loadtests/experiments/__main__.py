"""`python -m loadtests.experiments paper`, `arms`, `policies`: many simulations, as tables and plots.

What takes time to import is imported when a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Experiments in virtual time, with the real control plane.")

TracesFolder = Annotated[
    Path | None, typer.Option("--traces", help="Folder of trace files.", envvar="PD_SERVE_TRACES")
]
CostModelName = Annotated[str, typer.Option("--cost-model", help="Name, or a CSV file of measured steps.")]
NumBlocks = Annotated[int, typer.Option("--blocks", min=1, help="KV blocks of 16 tokens per instance.")]
TtftSlo = Annotated[float, typer.Option("--slo-ttft", help="Bound on the first token, in seconds.")]
TpotSlo = Annotated[float, typer.Option("--slo-tpot", help="Bound on the mean time of later ones.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes. (default: one per core)")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for tables, plots and finished runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what the folder has results of.")]
Seed = Annotated[int, typer.Option(help="Of lengths, arrivals and everything random.")]


@app.command()
def paper(
    out: OutFolder,
    figure: Annotated[
        list[int] | None, typer.Option(help="10 to 16; may be given again. (default: all)")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The paper's points, as JSON. (default: where the project has them)")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Per run. The paper has 10,000.")] = 10_000,
    rates: Annotated[
        str, typer.Option(help="Points of each curve: all, or first,last or one of these.")
    ] = "all",
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    traces: TracesFolder = None,
) -> None:
    """Run the experiments of the Llumnix paper; write tables and plots, beside the paper's points."""
    from loadtests.experiments.paper.figure import Options
    from loadtests.experiments.paper.reproduce import run as reproduce

    options = Options.of(requests, rates, seed, reference)
    reproduce(figure or [], options, out, jobs, traces, fresh)


@app.command()
def arms(
    out: OutFolder,
    requests: Annotated[int, typer.Option(min=1, help="Per run.")] = 10_000,
    slo_ttft: TtftSlo = 5.0,
    slo_tpot: TpotSlo = 0.1,
    jobs: Jobs = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    traces: TracesFolder = None,
) -> None:
    """Compare 16 instances with and without disaggregation, rescheduling, de-fragmentation and priorities."""
    from loadtests.experiments.arms import run as compare
    from pd_serve.simulation.summary import Slo

    compare(out, requests, Slo(slo_ttft, slo_tpot), seed, jobs, traces, fresh)


@app.command()
def policies(
    out: OutFolder,
    requests: Annotated[int, typer.Option(min=1, help="Per run.")] = 10_000,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each, with seeds from 0 on.")] = 2,
    jobs: Jobs = None,
    fresh: Fresh = False,
) -> None:
    """Compare the steps from the paper's Llumnix to our defaults, on several traces and seeds."""
    from loadtests.experiments.ablation import run as compare

    compare(out, requests, range(seeds), jobs, fresh)


if __name__ == "__main__":
    app()
