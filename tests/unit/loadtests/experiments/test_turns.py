"""Second turns on four instances: the simulations, one small run, and what is found."""

from pathlib import Path

import pytest

from loadtests.experiments import turns
from loadtests.experiments.figure import FigureOptions, FigurePoint
from loadtests.experiments.result_store import ExperimentRun
from tests.unit.loadtests.experiments.made_figures import ALL, options


def test_all_layouts_get_the_same_nine_kinds_on_four_instances() -> None:
    scenarios = turns.scenarios_of(options(rates=ALL), 30.0)

    assert {sum(one.scenario.instances.values()) for one in scenarios} == {4}
    assert len({one.panel for one in scenarios}) == 9
    assert len(scenarios) == 9 * len(turns.RATES) * len(turns.LAYOUTS)
    traces = {(one.panel, one.x): set[str]() for one in scenarios}
    for one in scenarios:
        traces[one.panel, one.x].add(str(one.scenario.trace))
    assert all(len(equal) == 1 for equal in traces.values())


@pytest.mark.usefixtures("in_this_process")
def test_a_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TEXTS", (64,))
    monkeypatch.setattr(turns, "ANSWERS", (64,))
    monkeypatch.setattr(turns, "RATES", (20.0,))
    monkeypatch.setattr(turns, "LEAST_REQUESTS", 10)

    turns.run_turns(FigureOptions(20), 1.0, ExperimentRun(tmp_path, jobs=1))

    text = (tmp_path / "turns.md").read_text(encoding="utf-8")
    assert f"{len(turns.LAYOUTS)} simulations of 20 requests" in text
    assert "Second TTFT Mean (s), conditional 2 + 2" in text
    assert "wrong tokens" not in text


def test_findings_compare_equal_splits_and_count_where_ours_is_behind() -> None:
    points = []
    for x in (1.0, 2.0):
        for title in turns.LAYOUTS:
            fast = title.startswith("conditional")
            values = {
                turns.TTFT: 0.01 if fast else 0.04,
                turns.TPOT: 0.01,
                turns.ATTAINMENT: (0.9 if fast else 0.8) if x == 1.0 else (0.7 if fast else 0.95),
            }
            points += [FigurePoint("64:64", title, name, x, value) for name, value in values.items()]

    lines = turns._findings(points)

    assert lines[0] == "conditional 1 + 3 against PD 1 + 3: second TTFT 0.25 x, TPOT 1.00 x"
    assert lines[-1].startswith("conditional, neutral: attainment 70.0% at least, 80.0% in the mean")
    assert lines[-1].endswith("at 1 of 2 points")
