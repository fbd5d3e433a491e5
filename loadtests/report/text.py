"""The numbers of a load as lines for a terminal."""

from typing import Any

from loadtests.options import LoadOptions, slo_text
from loadtests.outcome import LATE_S

_CHECKED = {
    "simulated": "every stream compared with the output of a simulated engine for its prompt",
    "repeat": "every stream compared with the answer to the same request sent again",
    "count": "tokens only counted; their values are not known for this model",
}


def summary_lines(summary: dict[str, Any], options: LoadOptions, check: str) -> list[str]:
    """Lines for the result of `loadtests.outcome.summarize`."""
    goodput = summary["goodput"]
    lines = [
        "",
        f"{summary['ended']} of {summary['planned']} requests ended in {summary['duration_s']:.1f} s, "
        f"{summary['failed']} failed; {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} tokens/s",
        f"check: {check}: {_CHECKED.get(check, 'nothing was checked')}",
    ]
    lines += [f"  {count} x {kind}" for kind, count in summary["failures"].items()]
    lines.append(f"{'ms':>10} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}")
    for name, figures in summary["latencies_ms"].items():
        lines.append(f"{name.upper():>10} " + " ".join(_number(value) for value in figures.values()))
    if options.slo:
        lines.append(
            f"good ({slo_text(options.slo)}): {goodput['good']} requests, share {goodput['share']:.3f}"
            + (f" of at least {options.goodput:g} wanted" if options.goodput is not None else "")
            + f", goodput {goodput['requests_per_s']:.2f} requests/s"
        )
    late = summary["late_start_ms"]["p99"]
    if late is not None and late > LATE_S * 1e3:
        lines.append(
            f"warning: 1 % of the requests started {late:.0f} ms late or more: the load generator is too slow"
        )
    return lines


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.1f}"
