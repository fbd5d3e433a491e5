"""`pd-serve simulate run`: one workload on one simulated cluster. Imports what takes time when it runs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from pd_serve.cli.simulate_faults import faults
from pd_serve.config import DEFAULT_COST_MODEL, DEFAULT_POLICY
from pd_serve.errors import InvalidRequestError
from pd_serve.setting_types import parse_bounds, parse_settings
from router.scaling import PoolBounds

DEFAULT_INSTANCES = 16

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Simulate a cluster in virtual time, with the control plane of production.",
)


app.command()(faults)


@app.command()
def run(
    trace: Annotated[
        str,
        typer.Option(
            help="Workload: s-s, m-m, l-l, s-l, l-s, PROMPT:OUTPUT for fixed lengths, sessions:TURNS or"
            " TEXT:ANSWER+TEXT:ANSWER for sessions (generated, need --rate), azure-conv, azure-code, mooncake"
            " or sharegpt (from a file), or the path of a file."
        ),
    ],
    policy: Annotated[str, typer.Option(help="Policy set; see pd-serve policies.")] = DEFAULT_POLICY,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the policy; may be repeated."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests/s. [default: as recorded]")] = None,
    requests: Annotated[
        int | None, typer.Option(help="Number of requests. [default: 10000, or those of the file]")
    ] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Neutral instances. [default: 16]")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill instances.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode instances.")] = 0,
    autoscale: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]MIN:MAX", help="Scale the pool of a role, or all; may be repeated."),
    ] = None,
    arrivals: Annotated[
        str | None, typer.Option(help="poisson, gamma:CV, sine:RATIO:PERIOD_S or recorded.")
    ] = None,
    priority_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests of high priority.")
    ] = 0.0,
    cost_model: Annotated[
        str,
        typer.Option(
            help="GPUs and model of an instance, such as h100x4-llama-3.1-70b, or a CSV file of measured"
            " steps."
        ),
    ] = DEFAULT_COST_MODEL,
    blocks: Annotated[
        int | None,
        typer.Option(min=1, help="KV blocks of 16 tokens of each instance. [default: the cost model's]"),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Token budget per step of chunked prefill; 0: off. [default: the cost model's]"
        ),
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV cache of requests with the same beginning.")
    ] = False,
    max_migrations: Annotated[
        int, typer.Option(min=1, help="Migrations of an instance at a time, in each direction.")
    ] = 64,
    slo_ttft: Annotated[float, typer.Option(help="Bound on the time to first token, in seconds.")] = 5.0,
    slo_tpot: Annotated[
        float | None,
        typer.Option(
            help="Bound on the mean time per output token, in seconds; if given, the setting itl_target_s"
            " of the policy, too. [default: 0.1]"
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Machines; the instances of each role are spread over them.")
    ] = 1,
    far_gb_per_s: Annotated[
        float,
        typer.Option(min=0, help="GB/s of KV copies between machines. [default: as within one]"),
    ] = 0.0,
    refuse: Annotated[
        bool,
        typer.Option(
            "--refuse", help="Requests bring these bounds as targets: what cannot meet the first is refused."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of lengths, arrivals and everything random.")] = 0,
    traces: Annotated[
        Path | None, typer.Option(help="Folder of trace files.", envvar="PD_SERVE_TRACES")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Simulate one workload on one cluster, and show its latencies."""
    from pd_serve.cli import simulate_output as output
    from pd_serve.simulation.scenario import Scenario
    from pd_serve.simulation.workloads import TraceSpec
    from router.slo import Slo

    cluster = cluster_of(instances, prefill, decode)
    overrides = parse_settings(settings or [])
    if slo_tpot is not None:
        overrides.setdefault("itl_target_s", slo_tpot)
    scenario = Scenario(
        trace=TraceSpec(trace, rate, requests, arrivals, priority_fraction, seed),
        policy=policy,
        instances=cluster,
        overrides=overrides,
        cost_model=cost_model,
        num_blocks=blocks,
        chunk_tokens=chunk_tokens,
        prefix_caching=prefix_caching,
        autoscale=bounds_of(autoscale or [], list(cluster)),
        max_migrations=max_migrations,
        slo=Slo(slo_ttft, 0.1 if slo_tpot is None else slo_tpot),
        refuses=refuse,
        nodes=nodes,
        far_gb_per_s=far_gb_per_s,
    )
    output.run_and_show(scenario, traces, json_file)


def cluster_of(neutral: int | None, prefill: int, decode: int) -> dict[str, int]:
    """Number of instances at the start, by role: neutral, or prefill and decode, or all three.

    Raises:
        InvalidRequestError: No instance could prefill, or none decode.
    """
    if neutral is None:
        neutral = 0 if prefill or decode else DEFAULT_INSTANCES
    if not neutral and not (prefill and decode):
        raise InvalidRequestError(
            "--prefill and --decode must both be at least 1 without neutral --instances"
        )
    counts = {"prefill": prefill, "decode": decode, "neutral": neutral}
    return {role: count for role, count in counts.items() if count}


def bounds_of(texts: Iterable[str], roles: Sequence[str]) -> dict[str, PoolBounds]:
    """Bounds by role from `MIN:MAX` for all roles, or `ROLE=MIN:MAX` for one.

    Raises:
        InvalidRequestError: The text is neither, or there is no such role.
    """
    found: dict[str, PoolBounds] = {}
    for text in texts:
        role, equals, span = text.rpartition("=")
        if equals and role not in roles:
            raise InvalidRequestError(f"--autoscale {text}: there are no {role} instances")
        try:
            found |= dict.fromkeys([role] if equals else roles, parse_bounds(span))
        except ValueError as error:
            raise InvalidRequestError(f"--autoscale: {error}") from None
    return found
