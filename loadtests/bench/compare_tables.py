"""The tables of `bench compare`."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from loadtests.terminal import numbers_table

LATENCIES = {
    "TTFT": ("ttft_p50_ms", "ttft_p99_ms"),
    "of later turns": ("later_ttft_p50_ms", "later_ttft_p99_ms"),
    "TPOT": ("tpot_p50_ms", "tpot_p99_ms"),
    "ITL": ("itl_p50_ms", "itl_p99_ms"),
    "longest gap": ("longest_gap_p50_ms", "longest_gap_p99_ms"),
}


def arms(size: int, numbers: Mapping[str, Any]) -> Table:
    """All arms of one number of engines, under every load."""
    columns = ("load", "", *LATENCIES, "tokens/s", "CPU ms/token", "failed")
    table = numbers_table(f"{size} engines; ms as P50 / P99", *columns, labels=2)
    loads = next(iter(numbers["arms"].values()))["figures"]
    for load in loads:
        for arm in numbers["arms"].values():
            figures = arm["figures"][load]
            pairs = [" / ".join(_number(figures, name) for name in names) for names in LATENCIES.values()]
            last = [_number(figures, name) for name in ("output_tokens_per_s", "cpu_ms_per_token")]
            table.add_row(load, arm["title"], *pairs, *last, f"{figures['failures']}/{figures['requests']}")
        table.add_section()
    return table


def conversations(size: int, numbers: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    """All arms under vLLM's benchmark of conversations."""
    columns = ("", "first TTFT", "later TTFT", "÷ round robin", "TPOT", "latency", "equal conversations")
    table = numbers_table(f"{size} engines; ms as P50 / P99", *columns, labels=1)
    for name, arm in numbers.items():
        pairs = [
            " / ".join(_number(arm["figures"], f"{figure}_{part}_ms") for part in ("p50", "p99"))
            for figure in ("first_ttft", "later_ttft", "tpot", "latency")
        ]
        ratios = arm["ratio_to_round_robin"]
        pairs.insert(2, " / ".join(_number(ratios, f"later_ttft_{part}_ms") for part in ("p50", "p99")))
        equal, of = arm["equal_conversations"]
        table.add_row(titles[name], *pairs, f"{equal} of {of}")
    return table


def routers(numbers: Mapping[str, Any]) -> Table:
    """The processes in front of the engines, alone."""
    columns = ("", "TTFT ms", "added ms", "CPU ms/request", "requests/s per core")
    table = numbers_table("in front of the engines: one process each", *columns, labels=1)
    for name, figures in numbers["targets"].items():
        keys = ("ttft_ms", "added_ttft_ms", "cpu_ms_per_request", "requests_per_s_per_core")
        table.add_row(name, *(_number(figures, key) for key in keys))
    return table


def _number(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "–"
    value = figures[name]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
