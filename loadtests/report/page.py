"""The report of a load test: one self-contained HTML file, and all plots as one PNG."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from loadtests.latency_statistics import STATISTICS
from loadtests.options import Limit, slo_text
from loadtests.report import cluster_samples, plots
from loadtests.report.cluster_samples import ClusterSample
from loadtests.report.plots import PlotData

TEMPLATE = Path(__file__).with_name("page.html.j2")

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per later token",
    "itl": "between two chunks",
    "gap": "longest gap",
    "e2e": "whole request",
}


@dataclass(frozen=True, slots=True)
class LoadTestReport:
    """The content of a report.

    Attributes:
        result: The content of Locust's `--report` file.
        events: (seconds since the load began, action taken on the cluster).
        problems: Reasons why the test failed; empty for success.
        commands: The command lines of the test.
    """

    result: dict[str, Any]
    samples: Sequence[ClusterSample]
    events: Sequence[tuple[float, str]] = ()
    problems: Sequence[str] = ()
    commands: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Writes `report.html` and `report.png`."""
        data = PlotData(self.result["requests"], self.samples, self.events)
        images = {title: _data_uri(svg) for title, svg in plots.svgs(data).items()}
        (folder / "report.html").write_text(self.html(images))
        plots.picture(data, folder / "report.png")

    def html(self, images: dict[str, str]) -> str:
        """The page. `images` are URIs by title."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        summary, machine = self.result["summary"], self.result["machine"]
        slo = [Limit(name, most_s) for name, most_s in summary["goodput"]["slo_s"].items()]
        return environment.from_string(TEMPLATE.read_text()).render(
            at=self.result["at"],
            commit=self.result["commit"],
            machine=f"{machine['cores']} cores of {machine['cpu']}",
            summary=summary,
            tokens=sum(row["tokens"] for row in self.result["requests"]),
            check=self.result["check"],
            problems=self.problems,
            slo=slo_text(slo),
            columns=STATISTICS,
            titles=TITLES,
            number=_number,
            images=images,
            events=self.events,
            decisions=cluster_samples.decisions(self.samples),
            commands=self.commands,
        )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
