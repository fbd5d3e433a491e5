"""The report of a run: one self-contained HTML file with a timeline, and all numbers as JSON."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from loadtests.chaos import timeline, verdict
from loadtests.chaos.injector import FaultRecord
from loadtests.chaos.monitor import Death
from loadtests.checked_load import StreamRecord
from loadtests.outcome import as_row
from loadtests.report.cluster_samples import ClusterSample
from pd_serve.observe.provenance import provenance, write

TEMPLATE = Path(__file__).with_name("page.html.j2")

#: Pauses and failures that the page lists; the JSON has all.
LISTED = 40


@dataclass(frozen=True, slots=True)
class ChaosResult:
    """What happened in a run.

    Attributes:
        command: The command line of the service.
        problems: Reasons why the run failed; empty for success.
    """

    seed: int
    command: str
    streams: Sequence[StreamRecord]
    faults: Sequence[FaultRecord]
    samples: Sequence[ClusterSample]
    deaths: Sequence[Death]
    problems: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`, without command and machine."""
        return {
            "seed": self.seed,
            "service": self.command,
            "problems": list(self.problems),
            "summary": verdict.summary(self.streams, self.faults),
            "faults": [asdict(record) | {"text": str(record)} for record in self.faults],
            "deaths": [asdict(death) for death in self.deaths],
            "streams": [
                as_row(stream.outcome)
                | {"refusals": stream.refusals, "broken": stream.broken, "excused": stream.excused}
                | {"pauses": [(pause.begin_s, pause.length_s) for pause in stream.pauses]}
                for stream in self.streams
            ],
        }


def write_report(result: ChaosResult, folder: Path) -> None:
    """Writes `report.html`, `report.json` and `timeline.svg`."""
    origin = provenance()
    write(folder / "report.json", origin | result.as_json())
    svg = timeline.svg(result.streams, result.faults, result.samples)
    (folder / "timeline.svg").write_text(svg)
    (folder / "report.html").write_text(html(result, origin, svg))


def html(result: ChaosResult, origin: dict[str, Any], svg: str) -> str:
    """The page.

    Args:
        origin: See `pd_serve.observe.provenance`.
        svg: The timeline.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pauses = sorted(
        ((pause, stream) for stream in result.streams for pause in stream.pauses),
        key=lambda pair: -pair[0].length_s,
    )
    failures = [stream for stream in result.streams if stream.outcome.error is not None]
    machine = origin["machine"]
    return environment.from_string(TEMPLATE.read_text()).render(
        at=origin["at"],
        commit=origin["commit"],
        command=origin["command"],
        machine=f"{machine['cores']} cores of {machine['cpu']}",
        result=result,
        summary=verdict.summary(result.streams, result.faults),
        pauses=pauses[:LISTED],
        failures=failures[:LISTED],
        image="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"),
    )
