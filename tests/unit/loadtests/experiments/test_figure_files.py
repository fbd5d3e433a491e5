"""The files of a figure."""

import csv
from pathlib import Path

import pytest

from loadtests.experiments import plots
from loadtests.experiments.figure_files import write_figure
from loadtests.experiments.result_store import ExperimentRun
from tests.unit.loadtests.experiments.made_figures import FIGURE, POINTS, console


def test_tables_and_a_plot_are_written(tmp_path: Path) -> None:
    write_figure(FIGURE, POINTS, ["a note"], ExperimentRun(tmp_path), console())

    rows = list(csv.DictReader((tmp_path / "figure99-test.csv").read_text().splitlines()))
    page = (tmp_path / "figure99-test.md").read_text()
    assert rows[0]["ours/paper"] == "2"
    assert (rows[1]["paper"], rows[2]["ours"]) == ("", "")
    assert "| Prefill P99 (s), INFaaS++ | 4 (2) | 9 |" in page
    assert "- a note" in page
    assert "| Decode P99 | 2.00 | 1 |" in page
    assert (tmp_path / "figure99-test.png").stat().st_size > 5000


def test_without_matplotlib_only_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)

    write_figure(FIGURE, POINTS, [], ExperimentRun(tmp_path), console())

    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md"]
