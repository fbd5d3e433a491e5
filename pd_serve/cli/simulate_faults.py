"""`pd-serve simulate faults`: seeded fault schedules in virtual time. Imports the simulation when it runs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.console
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pd_serve.errors import InvalidRequestError
from pd_serve.observe import provenance

if TYPE_CHECKING:
    from pd_serve.simulation.faults.campaign import CampaignResult

#: Findings that are shown for one seed.
SHOWN_FINDINGS = 5


class Until(StrEnum):
    """Ends a campaign early."""

    FAIL = "FAIL"


def faults(
    seeds: Annotated[str, typer.Option(metavar="A:B", help="Seeds from A up to B, without B.")] = "0:300",
    tier: Annotated[
        int,
        typer.Option(
            min=1,
            max=4,
            help="1: small clusters with single faults. 2: also lost messages, partitions and operations."
            " 3: many faults at once, and pools that scale. 4: single messages and orders that are lost,"
            " several processes that die together, clients that leave at each stage of a request.",
        ),
    ] = 1,
    until: Annotated[
        Until | None, typer.Option(case_sensitive=False, help="FAIL: end with the first seed that fails.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Run this seed only.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--faults", metavar="N,N", help="With --seed: only these faults of its schedule, or none."
        ),
    ] = None,
    trace: Annotated[bool, typer.Option(help="With --seed: show all that happens.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Fail a simulated cluster by seeded schedules, and check that clients lose nothing.

    Each seed gives a cluster, its requests and its faults. The control plane is the one that serves; engines,
    network and clock are simulated. Exits with 1 if anything was found.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if seed is not None:
        failed = _run_one(console, seed, tier, only, trace=trace, json_file=json_file)
    elif only is not None or trace:
        raise InvalidRequestError("--faults and --trace need --seed")
    else:
        failed = _run_all(console, _range(seeds), tier, until is not None, workers, json_file)
    if failed:
        raise typer.Exit(1)


def _range(text: str) -> range:
    first, colon, end = text.partition(":")
    if not colon or not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
        raise InvalidRequestError(f"--seeds {text}: not of the form A:B with A < B")
    return range(int(first), int(end))


def _run_all(
    console: rich.console.Console, seeds: range, tier: int, until: bool, workers: int, json_file: Path | None
) -> bool:
    from pd_serve.simulation.faults.campaign import run_campaign

    about = provenance.provenance()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = rich.console.Console(stderr=True, highlight=False)
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(f"seeds of tier {tier}", total=len(seeds))

        def show(result: "CampaignResult") -> None:
            progress.update(task, completed=result.seeds, description=f"{len(result.failed)} failed")

        result = run_campaign(seeds, tier, until_failure=until, workers=workers, on_progress=show)
    for failed in result.failed:
        console.print(f"[bold red]seed {failed.seed}[/]", *failed.texts, sep="\n    ")
        for finding in failed.findings[:SHOWN_FINDINGS]:
            console.print(f"  found: {finding}", markup=False)
        console.print(f"  {failed.replay}", markup=False)
    console.print(
        f"{result.seeds:,} seeds of tier {tier}, {len(result.failed):,} with findings:"
        f" {result.streams:,} streams, {result.tokens:,} tokens, {result.deaths:,} deaths of instances;"
        f" {result.simulated_s / 3600:,.1f} h in {result.wall_s:,.0f} s"
        f" ({result.cpu_s / max(1, result.seeds):.2f} s CPU per seed)"
    )
    console.print("recovered:", ", ".join(f"{n:,} {kind}" for kind, n in result.recoveries.most_common()))
    if json_file is not None:
        provenance.write(json_file, result.as_json() | about)
        screen.print(f"written to {json_file}")
    return bool(result.failed)


def _run_one(
    console: rich.console.Console,
    seed: int,
    tier: int,
    only: str | None,
    *,
    trace: bool,
    json_file: Path | None,
) -> bool:
    import msgspec

    from pd_serve.simulation.faults.draw import draw
    from pd_serve.simulation.faults.run import run

    schedule = draw(seed, tier)
    if only is not None:
        try:
            schedule = schedule.only([] if only == "none" else [int(number) for number in only.split(",")])
        except (ValueError, IndexError):
            text = f"--faults {only}: the schedule has the faults 0 to {len(schedule.faults) - 1}"
            raise InvalidRequestError(text) from None
    about = provenance.provenance()
    console.print(f"seed {seed} of tier {tier}: {schedule.shape.instances}", markup=False)
    for number, fault in enumerate(schedule.faults):
        console.print(f"  {number}: {fault}", markup=False)
    result = run(schedule, trace=trace)
    for line in result.trace:
        console.print(line, markup=False)
    for finding in result.findings:
        console.print(f"found: {finding}", markup=False)
    console.print(f"{result.streams} streams, {result.tokens} tokens, {len(result.findings)} findings")
    if json_file is not None:
        content = msgspec.to_builtins(result) | {"schedule": msgspec.to_builtins(schedule)}
        provenance.write(json_file, content | about)
    return bool(result.findings)
