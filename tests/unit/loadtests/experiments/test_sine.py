"""Autoscaling beside the best fixed layout: the search for that one, and the files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import rich.console
from typer.testing import CliRunner

from loadtests.experiments import sine
from loadtests.experiments.__main__ import app
from loadtests.experiments.result_store import ExperimentRun, Results
from loadtests.experiments.sine import ATTAINMENT, FixedLayout, Measured, SineOptions
from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec, make_requests


def outcome(layout: FixedLayout, *, holds: bool) -> Measured:
    return Measured(f"{layout}", [1.0, ATTAINMENT if holds else ATTAINMENT - 0.01], [1.0], [1.0], [0.01])


def searched(
    least_decode: dict[int, int], *candidates: FixedLayout
) -> tuple[list[FixedLayout], list[FixedLayout]]:
    """The layouts that were measured, and those of them that meet the target.

    Args:
        least_decode: Decode instances that meet it, by number of prefill instances.
    """
    tried = sine.best_fixed(
        candidates, lambda layout: outcome(layout, holds=layout.decode >= least_decode[layout.prefill])
    )
    return list(tried), [layout for layout, one in tried.items() if one.holds]


def test_the_search_goes_down_from_a_layout_that_holds_until_one_does_not() -> None:
    tried, held = searched({6: 8}, FixedLayout(6, 10))

    assert tried == [FixedLayout(6, n) for n in (10, 9, 8, 7)]
    assert held[-1] == FixedLayout(6, 8)


def test_the_search_goes_up_from_a_layout_that_does_not_hold() -> None:
    tried, held = searched({6: 12}, FixedLayout(6, 10))

    assert (tried, held) == ([FixedLayout(6, n) for n in (10, 11, 12)], [FixedLayout(6, 12)])


def test_only_smaller_layouts_than_the_best_are_tried_with_another_split() -> None:
    tried, held = searched({6: 8, 7: 6}, FixedLayout(6, 8), FixedLayout(7, 8))
    assert tried == [FixedLayout(6, 8), FixedLayout(6, 7)]

    tried, held = searched({6: 9, 7: 6}, FixedLayout(6, 8), FixedLayout(7, 7))
    assert tried == [
        FixedLayout(6, 8),
        FixedLayout(6, 9),
        FixedLayout(7, 7),
        FixedLayout(7, 6),
        FixedLayout(7, 5),
    ]
    assert min(held, key=lambda layout: layout.size) == FixedLayout(7, 6)


def test_the_search_ends_where_nothing_holds() -> None:
    tried, held = searched({6: 99}, FixedLayout(6, 10))

    assert (len(tried), held) == (sine.MOST_LAYOUTS, [])


def test_the_fast_model_finds_layouts_near_the_peak() -> None:
    """At a quarter of the rate, two prefill instances are enough for a peak that takes 1.6 of them."""
    requests = make_requests(TraceSpec(sine.TRACE, 6.0, 400, "poisson"))

    found = sine.promising(requests, 6.0)

    assert found
    assert found[0].prefill == 2
    assert 2 <= found[0].decode <= 6


def summary(instances: float, attainment: float) -> dict[str, Any]:
    wrong = ("failed", "lost_tokens", "duplicated_tokens", "wrong_tokens", "leaked_blocks")
    return dict.fromkeys(wrong, 0) | {
        "attainment": attainment,
        "avg_instances": instances,
        "duration_s": 1800.0,
        "prefill_s": {"p99": 1.5},
        "decode_s": {"p99": None},
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Scenario]:
    """The scenarios that were run. A fixed layout holds with 10 decode instances; the others have 8."""
    seen: list[Scenario] = []

    def run(scenarios: Iterable[Scenario], run: ExperimentRun, console: rich.console.Console) -> Results:
        scenarios = list(scenarios)
        seen.extend(scenarios)
        sizes = {s.key: 8.0 if s.autoscale else float(sum(s.instances.values())) for s in scenarios}
        return {key: summary(size, 0.96 if size in (8.0, 17.0) else 0.9) for key, size in sizes.items()}

    monkeypatch.setattr(sine, "run_scenarios", run)
    monkeypatch.setattr(sine, "promising", lambda requests, peak: [FixedLayout(7, 10)])
    return seen


def test_every_cluster_gets_the_same_requests_and_a_row(tmp_path: Path, seen: list[Scenario]) -> None:
    sine.run_sine(SineOptions(seeds=3, share=0.002), ExperimentRun(tmp_path))

    result = json.loads((tmp_path / "sine.json").read_text())
    assert result["best_fixed"] == "7 + 10 instances"
    titles = [row["title"] for row in result["clusters"]]
    assert titles == ["7 + 10 instances", "7 + 9 instances", *sine.ARMS]
    work = result["clusters"][-1]
    assert (work["attainment"], work["instance_hours"]) == ([0.96] * 3, [4.0] * 3)
    assert work["hours_to_best_fixed"] == pytest.approx(8 / 17)
    assert {str(scenario.trace) for scenario in seen[:3]} == {str(scenario.trace) for scenario in seen[-3:]}
    assert {scenario.trace.seed for scenario in seen} == {0, 1, 2}
    assert (
        "| 7 + 10 instances (best fixed) | 96.0%, 96.0%, 96.0% | 8.50" in (tmp_path / "sine.md").read_text()
    )


def test_a_load_that_no_layout_holds_is_an_error(
    tmp_path: Path, seen: list[Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sine, "promising", lambda requests, peak: [])

    with pytest.raises(PdServeError, match="no fixed layout holds the target: none fits"):
        sine.run_sine(SineOptions(share=0.002), ExperimentRun(tmp_path))


def test_a_run_with_wrong_tokens_means_nothing() -> None:
    scenarios = sine.scenarios_of(SineOptions(seeds=1), {"prefill": 1, "decode": 1})

    with pytest.raises(PdServeError, match=r"work: wrong_tokens: \[1\]"):
        sine.measured("work", scenarios, {scenarios[0].key: summary(8.0, 1.0) | {"wrong_tokens": 1}})


def test_a_cluster_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sine", "--out", str(tmp_path), "--arm", "magic"])

    assert "no cluster 'magic'; there are freeness; freeness, forecast" in str(done.exception)
    done = CliRunner().invoke(app, ["sine", "--out", str(tmp_path), "--share", "nan"])
    assert done.exit_code


@pytest.mark.usefixtures("in_this_process")
def test_simulations_run_from_the_command_to_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sine, "promising", lambda requests, peak: [FixedLayout(1, 1)])
    arguments = [
        "sine",
        "--out",
        str(tmp_path),
        "--share",
        "0.0002",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--arm",
        "work",
    ]

    done = CliRunner().invoke(app, arguments, catch_exceptions=False)

    assert done.exit_code == 0
    titles = [row["title"] for row in json.loads((tmp_path / "sine.json").read_text())["clusters"]]
    assert titles == ["1 + 1 instances", "work"]
