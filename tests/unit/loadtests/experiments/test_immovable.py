"""Engines that cannot move requests: the simulations, one small run, and what is found."""

from pathlib import Path

import pytest

from loadtests.experiments import immovable
from loadtests.experiments.figure import FigureOptions, FigurePoint
from loadtests.experiments.result_store import ExperimentRun
from tests.unit.loadtests.experiments.made_figures import ALL, options


def test_all_arms_get_the_same_requests_on_four_instances() -> None:
    scenarios = immovable.scenarios_of(options(rates=ALL))

    assert {sum(one.scenario.instances.values()) for one in scenarios} == {4}
    assert len(scenarios) == len(immovable.LENGTHS) * len(immovable.RATES) * len(immovable.ARMS)
    traces = {(one.panel, one.x): set[str]() for one in scenarios}
    for one in scenarios:
        traces[one.panel, one.x].add(str(one.scenario.trace))
    assert all(len(equal) == 1 for equal in traces.values())


@pytest.mark.usefixtures("in_this_process")
def test_a_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(immovable, "LENGTHS", ("250:20",))
    monkeypatch.setattr(immovable, "RATES", (24.0,))

    immovable.run_immovable(FigureOptions(20), ExperimentRun(tmp_path, jobs=1))

    text = (tmp_path / "immovable.md").read_text(encoding="utf-8")
    assert f"{len(immovable.ARMS)} simulations of 20 requests" in text
    assert "PD, recompute against PD, they stay: TTFT Mean" in text
    assert "wrong tokens" not in text


def test_findings_are_means_over_all_points() -> None:
    points = []
    for x, factor in ((1.0, 2.0), (2.0, 8.0)):
        for title in immovable.ARMS:
            value = factor if title == immovable.RECOMPUTE else 1.0
            points += [
                FigurePoint("250:1000", title, metric, x, value)
                for metric in (immovable.TTFT, immovable.TPOT, immovable.GAP)
            ]

    assert immovable._findings(points) == [
        f"PD, recompute against {base}: TTFT Mean 4.00 x, TPOT Mean 4.00 x, Longest Gap P99 4.00 x"
        for base in ("PD, they stay", "neutral")
    ]
