"""Benchmarks: `python -m loadtests.bench` and the name of one of them.

A benchmark's module is imported when its command runs: some import vLLM.
"""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtests.bench.report import BenchmarkReport
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on
from pd_serve.observe.logs import configure_logging

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure on this machine, as ratios side by side in one run.",
)
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the numbers.")]


@app.command("migration")
def bench_migration(
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Requests per length.")] = 4,
) -> None:
    """Gap of a live migration against ITL, blocking copy and recompute; gap of a hand-off."""
    from loadtests.bench import migration

    _run(migration.run(BenchmarkReport(json_file), rounds))


@app.command("kinds")
def bench_kinds(
    json_file: JsonFile = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only this model of `pd_serve.models`; may be given several times."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Requests per length.")] = 2,
) -> None:
    """Gap of a live migration against ITL for every kind of engine, and for two workers."""
    from loadtests.bench import kinds

    _run(kinds.run(BenchmarkReport(json_file), kind or [], rounds))


@app.command("overhead")
def bench_overhead(
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each server at each load.")] = 8,
) -> None:
    """One neutral instance behind our API server against vLLM's own API server."""
    from loadtests.bench import overhead

    _run(overhead.run(BenchmarkReport(json_file), rounds))


@app.command("reports")
def bench_reports(json_file: JsonFile = None) -> None:
    """Reports of 256 running requests against the steps of their engine."""
    from loadtests.bench import reports

    _run(reports.run(BenchmarkReport(json_file)))


@app.command("step")
def bench_step(
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 10,
) -> None:
    """The step of an instance's engine, at rest and while requests move, against vLLM's engine core."""
    from loadtests.bench import step

    _run(step.run(BenchmarkReport(json_file), rounds))


@app.command("links")
def bench_links(
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way to read.")] = 11,
) -> None:
    """GB/s of the transport through shared memory, against NIXL alone and memcpy, beside busy steps."""
    from loadtests.bench import links

    _run(links.run(BenchmarkReport(json_file), rounds))


@app.command("scale")
def bench_scale(json_file: JsonFile = None) -> None:
    """Scheduler rounds, dispatches and load reports of up to 1,024 instances."""
    from loadtests.bench import scale

    _run(scale.run(BenchmarkReport(json_file)))


@app.command("serve")
def bench_serve(json_file: JsonFile = None) -> None:
    """One API server alone, behind Ray Serve's Python proxy and behind its HAProxy."""
    from loadtests.bench import ray_serve

    _run(ray_serve.run(BenchmarkReport(json_file)))


@app.command("simulator")
def bench_simulator(
    json_file: JsonFile = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests per round.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests/s. (default: a moderate load for the measured steps)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time to measure steps, per round.")] = 24.0,
    engine: Annotated[
        list[str] | None, typer.Option(help="Of the service: simulated or vllm. (default: both)")
    ] = None,
) -> None:
    """The simulator against the real service: the same requests on both."""
    from loadtests.bench import simulator

    engines = engine or simulator.ENGINES
    if unknown := set(engines) - set(simulator.ENGINES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: simulated or vllm")
    report = BenchmarkReport(json_file)
    _run(simulator.run(report, num_requests=requests, rate=rate, profile_s=seconds, engines=engines))


@app.command("simulation-speed")
def bench_simulation_speed(
    json_file: JsonFile = None,
    instances: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of instances; may be given several times. (default: 16, 64, 256)"),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per instance.")] = 60,
) -> None:
    """CPU time of the simulator per request, with an event per run of steps and per step."""
    from loadtests.bench import simulation_speed

    _run(simulation_speed.run(BenchmarkReport(json_file), instances or [16, 64, 256], requests))


@app.command("compare")
def bench_compare(
    json_file: JsonFile = None,
    engines: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Number of engines; may be given several times. (default: 3)"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm at each load.")] = 3,
    requests: Annotated[int, typer.Option(min=8, help="Requests per load and round.")] = 40,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests/s of the steady load.")] = 3.0,
    arm: Annotated[
        list[str] | None, typer.Option(help="Beside plain vLLM in turns; may be repeated. (default: all)")
    ] = None,
) -> None:
    """pd-serve beside plain vLLM, vLLM's NixlConnector, vllm-router and sglang-router, in one table."""
    from loadtests.bench import compare
    from loadtests.bench.arms import PLAIN, TITLES

    if unknown := [name for name in arm or [] if name not in TITLES]:
        raise typer.BadParameter(f"no arm {unknown[0]!r}; there are {', '.join(TITLES)}")
    report, names = BenchmarkReport(json_file), [PLAIN, *arm] if arm else []
    sizes = engines or [3]
    _run(compare.run(report, sizes=sizes, rounds=rounds, rate=rate, num_requests=requests, names=names))


@app.command("multi-turn")
def bench_multi_turn(
    script: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="benchmarks/multi_turn/benchmark_serving_multi_turn.py of vLLM's source package.",
        ),
    ],
    json_file: JsonFile = None,
    engines: Annotated[int, typer.Option(min=2, help="Number of engines.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm.")] = 3,
    conversations: Annotated[int, typer.Option(min=12, help="Conversations per round.")] = 24,
) -> None:
    """vLLM's own benchmark of conversations, on plain vLLM and on pd-serve."""
    from loadtests.bench import multi_turn

    report = BenchmarkReport(json_file)
    _run(multi_turn.run(report, script, size=engines, rounds=rounds, num_conversations=conversations))


def _run(benchmark: Coroutine[Any, Any, None]) -> None:
    import uvloop

    configure_logging("api")
    try:
        # Not closed: that would wait for threads that still start Ray or import vLLM. The process ends next.
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_until_sigterm(benchmark))
    except PdServeError as error:
        sys.exit(f"error: {error}")


async def _until_sigterm(benchmark: Coroutine[Any, Any, None]) -> None:
    end_on(signal.SIGTERM)
    try:
        await benchmark
    except asyncio.CancelledError:
        raise PdServeError("stopped before the end: only the numbers shown above were measured") from None


if __name__ == "__main__":
    app()
