"""Benchmarks: `python -m loadtests.bench migration`, `overhead`, `serve`, `simulator`, `compare`."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from pd_serve.observe.logs import configure_logging

bench = typer.Typer(no_args_is_help=True, help="Measure on this machine, as ratios side by side in one run.")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")]


@bench.command("migration")
def bench_migration(
    json_file: JsonFile = None,
    rounds: Annotated[int, typer.Option(help="Requests per length.")] = 4,
) -> None:
    """Gap of live migration against ITL, blocking copy and recompute; the hand-off gap."""
    from loadtests.bench import migration

    _run(migration.run(json_file, rounds))


@bench.command("overhead")
def bench_overhead(json_file: JsonFile = None) -> None:
    """One neutral instance behind our front end against vLLM's own API server."""
    from loadtests.bench import overhead

    _run(overhead.run(json_file))


@bench.command("serve")
def bench_serve(json_file: JsonFile = None) -> None:
    """Alone, behind Ray Serve's proxy and behind its HAProxy: what each costs a token."""
    from loadtests.bench import ingress

    _run(ingress.run(json_file))


@bench.command("simulator")
def bench_simulator(
    json_file: JsonFile = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests per round.")] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests/s. [default: a moderate load, by the measured steps]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time to measure steps, per round.")] = 12.0,
) -> None:
    """The simulator against reality: the same requests on real and on simulated instances."""
    from loadtests.bench import simulator

    _run(simulator.run(json_file, num_requests=requests, rate=rate, profile_s=seconds))


@bench.command("compare")
def bench_compare(
    json_file: JsonFile = None,
    engines: Annotated[
        list[int] | None, typer.Option(min=2, help="How many; may be given several times. [default: 3]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm at each load.")] = 3,
    requests: Annotated[int, typer.Option(min=8, help="Requests per load and round.")] = 40,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests/s of the steady load.")] = 3.0,
) -> None:
    """Ours beside plain vLLM, vLLM's NixlConnector, vllm-router and sglang-router, in one table."""
    from loadtests.bench import compare

    work = compare.run(json_file, sizes=engines or [3], rounds=rounds, rate=rate, num_requests=requests)
    _run(work)


def _run(work: Coroutine[Any, Any, None]) -> None:
    import uvloop

    configure_logging("api")
    # Not closed: that would wait for threads which still start Ray or import vLLM. The process ends next.
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(work)


if __name__ == "__main__":
    bench()
