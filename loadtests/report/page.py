"""The report of a load test: one self-contained HTML file, and all plots as one PNG."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from loadtests.options import Limit, slo_text
from loadtests.report import cluster_samples, plots
from loadtests.report.cluster_samples import ClusterSample
from loadtests.report.plots import PlotData

TEMPLATE = Path(__file__).with_name("page.html.j2")

COLUMNS = ("mean", "p50", "p90", "p99", "max")
TITLES = {
    "ttft": "time to first token",
    "tpot": "time per later token",
    "itl": "between two chunks",
    "gap": "longest gap",
    "e2e": "whole request",
}


def write(
    folder: Path,
    result: dict[str, Any],
    samples: Sequence[ClusterSample],
    events: Sequence[tuple[float, str]],
    problems: Sequence[str],
    commands: Sequence[str],
) -> None:
    """Writes `report.html` and `report.png`.

    Args:
        result: The content of Locust's `--report` file.
        events: (seconds since the load began, action taken on the cluster).
        problems: Reasons why the test failed; empty for success.
        commands: The command lines of the test.
    """
    data = PlotData(result["requests"], samples, events)
    images = {title: _data_uri(svg) for title, svg in plots.svgs(data).items()}
    (folder / "report.html").write_text(page(result, images, samples, events, problems, commands))
    plots.picture(data, folder / "report.png")


def page(
    result: dict[str, Any],
    images: dict[str, str],
    samples: Sequence[ClusterSample],
    events: Sequence[tuple[float, str]],
    problems: Sequence[str],
    commands: Sequence[str],
) -> str:
    """The HTML. `images` are URIs by title; the other arguments are those of `write`."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    summary, machine = result["summary"], result["machine"]
    slo = [Limit(name, most_s) for name, most_s in summary["goodput"]["slo_s"].items()]
    return environment.from_string(TEMPLATE.read_text()).render(
        at=result["at"],
        commit=result["commit"],
        machine=f"{machine['cores']} cores of {machine['cpu']}",
        summary=summary,
        tokens=sum(row["tokens"] for row in result["requests"]),
        check=result["check"],
        problems=problems,
        slo=slo_text(slo),
        columns=COLUMNS,
        titles=TITLES,
        number=_number,
        images=images,
        events=events,
        decisions=cluster_samples.decisions(samples),
        commands=commands,
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
