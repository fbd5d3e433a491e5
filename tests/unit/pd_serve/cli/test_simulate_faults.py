"""`pd-serve simulate faults`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve.cli.main import app
from pd_serve.frontend.token_ledger import TokenLedger

run = CliRunner().invoke


def test_seeds_without_findings_exit_with_0(tmp_path: Path) -> None:
    file = tmp_path / "result.json"

    done = run(app, ["simulate", "faults", "--seeds", "0:4", "--json", str(file)])

    assert done.exit_code == 0
    assert "4 seeds of tier 1, 0 with findings" in done.stdout
    assert json.loads(file.read_text())["seeds"] == 4


def test_a_finding_is_shown_with_the_command_that_runs_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenLedger, "_take", lambda self, index, output, now: False)

    done = run(app, ["simulate", "faults", "--seeds", "0:50", "--until", "fail"])

    assert done.exit_code == 1
    assert "found: request" in done.stdout
    assert "pd-serve simulate faults --tier 1 --seed 0 --faults none --trace" in done.stdout


def test_one_seed_is_run_with_its_trace() -> None:
    done = run(app, ["simulate", "faults", "--seed", "1", "--faults", "0", "--trace"])

    assert done.exit_code == 0
    assert "fault:" in done.stdout
    assert "0 findings" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--seeds", "5:5"], ["--seeds", "x"], ["--trace"], ["--seed", "1", "--faults", "77"]],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    done = run(app, ["simulate", "faults", *arguments])

    assert done.exit_code != 0
