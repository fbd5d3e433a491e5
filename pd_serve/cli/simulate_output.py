"""One run on the terminal: a progress bar, then a table."""

from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pd_serve.observe import provenance as report
from pd_serve.simulation.scenario import Scenario, run_scenario

NAMES = {
    "prefill_s": "prefill (TTFT)",
    "decode_s": "decode (TPOT)",
    "request_s": "request (E2E)",
    "longest_gap_s": "longest gap",
}


def run_and_show(scenario: Scenario, traces: Path | None, json_file: Path | None) -> None:
    """Runs a scenario, shows its summary, and writes it to a file if one is given.

    Raises:
        InvalidRequestError: The scenario cannot be simulated.
    """
    provenance = report.provenance()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = rich.console.Console(stderr=True, highlight=False)
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("requests", total=scenario.trace.requests)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        summary = run_scenario(scenario, traces, show)
    console = rich.console.Console(highlight=False)
    console.print(latencies(summary, f"{scenario}"))
    console.print(counts(summary))
    for problem in problems(summary):
        console.print(f"[bold red]wrong[/]  {problem}")
    if json_file is not None:
        report.write(json_file, summary | provenance)
        screen.print(f"written to {json_file}")


def latencies(summary: dict[str, Any], title: str) -> Table:
    """Mean, P50 and P99, also by class of priority if there are several."""
    table = Table("seconds", "requests", "mean", "P50", "P99", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    classes = {"": summary}
    if summary["by_priority"]["high"]["requests"]:
        classes |= {f", {name}": part for name, part in summary["by_priority"].items()}
    for key, name in NAMES.items():
        for suffix, part in classes.items():
            values = (part[key][which] for which in ("mean", "p50", "p99"))
            table.add_row(name + suffix, f"{part['requests']:,}", *map(_seconds, values))
    return table


def counts(summary: dict[str, Any]) -> Table:
    """Goodput, preemptions, migrations and other counts, one line each."""
    grid = Table.grid(padding=(0, 2))
    slo = summary["slo"]
    moves = [
        f"{count:,} {outcome} ({reason})"
        for reason, outcomes in summary["migrations"].items()
        for outcome, count in outcomes.items()
        if count
    ]
    attained = summary["attainment"]
    grid.add_row(
        "goodput",
        f"{summary['goodput']:.2f} requests/s within {slo['ttft_s']:g} s to the first token and "
        f"{slo['tpot_s'] * 1e3:g} ms for each later one ({'–' if attained is None else f'{attained:.1%}'})",
    )
    if summary["refused"]:
        grid.add_row("refused", f"{summary['refused']:,} requests, which could not meet their target")
    grid.add_row(
        "preemptions", f"{summary['preemptions']:,}, {summary['preemption_loss_s']:.3g} s lost per request"
    )
    grid.add_row("migrations", ", ".join(moves) or "none")
    grid.add_row("fragmentation", f"{summary['fragmentation']:.2%} of the cluster's memory, over time")
    grid.add_row("instances", f"{summary['avg_instances'] or 0:.2f} on average")
    if summary["left_out"]:
        grid.add_row("left out", f"{summary['left_out']} requests longer than an instance's memory")
    if summary["assumed"]:
        grid.add_row("assumed", f"the paper's {', '.join(summary['assumed'])}: the cost model has none")
    grid.add_row("simulated", f"{summary['duration_s']:,.0f} s in {summary['wall_s']:.1f} s")
    return grid


def problems(summary: dict[str, Any]) -> list[str]:
    """Violated guarantees: failures, lost or wrong tokens, leaked blocks."""
    names = ("failed", "lost_tokens", "duplicated_tokens", "wrong_tokens", "leaked_blocks")
    found = [f"{name.replace('_', ' ')}: {summary[name]}" for name in names if summary[name]]
    return [*found, *summary["integrity"]]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
