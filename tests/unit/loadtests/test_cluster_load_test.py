"""The end of a cluster load test: report and exit code."""

import json
from pathlib import Path

import pytest

from loadtests.cluster_load_test import ClusterLoadTest, busiest_ready
from tests.unit.loadtests.report.made_report import SAMPLES, load_result, row


def test_the_busiest_ready_instance_of_a_role_is_chosen() -> None:
    rows = [row("decode-0"), row("decode-1") | {"running": 9}, row("decode-2", "starting") | {"running": 99}]

    chosen = busiest_ready({"instances": rows}, "decode", at_least=2)

    assert chosen is not None
    assert chosen["id"] == "decode-1"
    assert busiest_ready({"instances": rows}, "decode", at_least=3) is None


@pytest.mark.parametrize(
    ("drained", "problems", "failed", "says"),
    [
        (True, [], 0, []),
        (True, ["integrity: a slot is not given back"], 0, ["integrity: a slot is not given back"]),
        (True, [], 2, ["2 requests: a token is lost"]),
        (False, [], 0, ["nothing was drained: there were never two ready decode instances"]),
    ],
)
def test_the_report_and_the_exit_code_name_every_problem(
    drained: bool,
    problems: list[str],
    failed: int,
    says: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = load_result() | {"began_at": 50.0}
    load["summary"]["failures"] = {"a token is lost": failed} if failed else {}
    (tmp_path / "report.json").write_text(json.dumps(load))
    test = ClusterLoadTest("disaggregated", tmp_path, 10.0, 2.0, problems=problems)
    test.events = [(55.0, "decode-0 is drained")] if drained else []
    test.samples = [(50.0 + sample.at_s, sample.cluster) for sample in SAMPLES]
    assert test.conclude(["pd-serve", "locust"]) == (1 if says else 0)
    shown = capsys.readouterr().out
    for problem in says:
        assert f"FAILED: {problem}" in shown
        assert problem in (tmp_path / "report.html").read_text()
    assert len(json.loads((tmp_path / "samples.json").read_text())["samples"]) == 4


def test_a_test_whose_load_did_not_run_fails(tmp_path: Path) -> None:
    assert ClusterLoadTest("neutral", tmp_path, 10.0, 2.0).conclude([]) == 1
