"""Experiments from the command to the files."""

from pathlib import Path

from typer.testing import CliRunner

from loadtests.experiments.__main__ import app


def test_figure_13_is_simulated_and_written(tmp_path: Path) -> None:
    arguments = f"paper --figure 13 --rates first --requests 20 --jobs 1 --out {tmp_path}"

    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    again = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)

    assert (done.exit_code, again.exit_code) == (0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure13-priorities.csv",
        "figure13-priorities.md",
        "figure13-priorities.png",
        "provenance.json",
        "runs",
    }
    assert "2 of 2 results are taken" in again.output
    assert "2 simulations of 20 requests" in (tmp_path / "figure13-priorities.md").read_text()


def test_figure_10_is_measured_and_written(tmp_path: Path) -> None:
    arguments = f"paper --figure 10 --rates first,last --out {tmp_path}"

    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)

    assert done.exit_code == 0
    assert "downtime of live migration from" in (tmp_path / "figure10-migration.md").read_text()
