"""The report of a run."""

import json
from pathlib import Path

from loadtests.chaos.injector import FaultRecord
from loadtests.chaos.monitor import Death
from loadtests.chaos.report import ChaosResult, write_report
from loadtests.chaos.schedule import Target
from loadtests.checked_load import StreamRecord
from loadtests.processes import ProcessKind
from loadtests.report.cluster_samples import ClusterSample
from tests.unit.loadtests.chaos.made_run import cluster, fault, instance, stream


def result(
    streams: list[StreamRecord], faults: list[FaultRecord], problems: list[str] | None = None
) -> ChaosResult:
    samples = [ClusterSample(float(at), cluster(instance())) for at in range(3)]
    deaths = [Death(5.0, ProcessKind.INSTANCE, 11)]
    return ChaosResult(42, "pd-serve serve tiny", streams, faults, samples, deaths, problems or [])


def test_the_report_has_the_timeline_and_all_numbers(tmp_path: Path) -> None:
    faults = [fault(), fault(Target.MANAGER, 3, at_s=7.0, freeze_s=4.0)]

    write_report(result([stream(), stream(1, end_s=12.0)], faults), tmp_path)

    page = (tmp_path / "report.html").read_text()
    assert "none lost, doubled" in page
    assert "kill decode-0 (pid 11)" in page
    assert "freeze 4.0 s manager-0 (pid 3)" in page
    assert "data:image/svg+xml;base64," in page
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["seed"] == 42
    assert numbers["summary"]["streams"] == len(numbers["streams"]) == 2
    assert numbers["streams"][0]["pauses"] == [[2.0, 3.0]]
    assert numbers["deaths"] == [{"at_s": 5.0, "kind": "instance", "pid": 11}]
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")


def test_a_failed_run_shows_its_problems_and_the_failed_streams(tmp_path: Path) -> None:
    failed = stream(7, error="a token is <lost>")

    write_report(result([failed], [], ["1 streams: a token is <lost>"]), tmp_path)

    page = (tmp_path / "report.html").read_text()
    assert "none lost" not in page
    assert page.count("a token is &lt;lost&gt;") == 2
