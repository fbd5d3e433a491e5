"""`pd-serve simulate`: one run, the paper's experiments, the same trace with and without disaggregation.

What takes time to import is imported when a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from pd_serve.simulated_engine.settings import FITTED_BLOCKS

app = typer.Typer(
    no_args_is_help=True, help="Simulate a cluster in virtual time, with the real control plane."
)

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


@app.callback()
def _simulate() -> None:
    """With one command only, Typer would take its name for an argument."""


@app.command()
def run(
    trace: Annotated[str, typer.Option(help="Name (s-s, m-m, l-l, s-l, l-s, azure-conv, ...) or file.")],
    policy: Annotated[str, typer.Option(help="Name of a policy set.")] = "llumnix",
    rate: Annotated[float | None, typer.Option(help="Requests/s. (default: as recorded)")] = None,
    requests: Annotated[int | None, typer.Option(help="How many. (default: 10,000, or the file)")] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Neutral instances. (default: 16)")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill instances.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode instances.")] = 0,
    arrivals: Annotated[str | None, typer.Option(help="poisson, gamma:CV or recorded.")] = None,
    priority_fraction: Annotated[float, typer.Option(help="Share of high priority.")] = 0.0,
    autoscale: Annotated[
        list[str] | None, typer.Option(metavar="[ROLE=]MIN:MAX", help="Bounds of every pool, or of one.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the policy to change.")
    ] = None,
    cost_model: CostModelName = "a10-llama-7b",
    blocks: NumBlocks = FITTED_BLOCKS,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Chunked prefill, with so many tokens per step.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Keep prompts for others that begin alike.")] = False,
    max_migrations: Annotated[int, typer.Option(min=1, help="Per instance and direction at a time.")] = 64,
    slo_ttft: TtftSlo = 5.0,
    slo_tpot: TpotSlo = 0.1,
    seed: Seed = 0,
    traces: TracesFolder = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Simulate one workload on one cluster."""
    from pd_serve.cli import simulate_options as options
    from pd_serve.cli import simulate_output as show
    from pd_serve.simulation.scenario import Scenario
    from pd_serve.simulation.summary import Slo
    from pd_serve.simulation.workloads import TraceSpec

    cluster = options.instances(instances, prefill, decode)
    case = Scenario(
        trace=TraceSpec(trace, rate, requests, arrivals, priority_fraction, seed),
        policy=policy,
        instances=cluster,
        overrides=options.settings(settings or []),
        cost_model=cost_model,
        num_blocks=blocks,
        chunk_tokens=chunk_tokens,
        prefix_caching=prefix_caching,
        autoscale=options.bounds(autoscale or [], list(cluster)),
        max_migrations=max_migrations,
        slo=Slo(slo_ttft, slo_tpot),
    )
    show.run_and_show(case, traces, json_file)
