"""Plots of figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.experiments import plots
from loadtests.experiments.figure import FigurePoint, Metric
from tests.unit.loadtests.experiments.made_figures import FIGURE, POINTS, point


@pytest.mark.parametrize("values", [[], [0.0], [None]])
def test_few_or_no_values_are_plotted(values: list[float | None], tmp_path: Path) -> None:
    plots.plot(
        FIGURE, [point("Llumnix", 1, value, None) for value in values] or POINTS[:1], tmp_path / "a.png"
    )

    assert (tmp_path / "a.png").exists()


def test_many_metrics_take_several_rows(tmp_path: Path) -> None:
    metrics = tuple(Metric(f"m{number}") for number in range(9))
    points = [FigurePoint(panel, "Llumnix", metric.name, 1, 1.0) for panel in "ab" for metric in metrics]

    plots.plot(replace(FIGURE, metrics=metrics), points, tmp_path / "a.svg")

    text = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {panel}: {metric.name} -->" in text for panel in "ab" for metric in metrics)
