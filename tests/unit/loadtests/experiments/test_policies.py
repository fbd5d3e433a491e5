"""The comparison of policies: a few small simulations, and their findings."""

from pathlib import Path

import pytest

from loadtests.experiments import policies
from loadtests.experiments.figure import FigureOptions, FigurePoint
from loadtests.experiments.result_store import ExperimentRun


def test_every_variant_runs_on_every_trace_with_every_seed() -> None:
    scenarios = policies.scenarios_of(FigureOptions(100), [0, 1])

    assert len(scenarios) == len(policies.TRACES) * 2 * len(policies.VARIANTS)
    assert {one.scenario.trace.seed for one in scenarios} == {0, 1}
    assert len({one.scenario.key for one in scenarios}) == len(scenarios)


def test_a_candidate_is_one_more_variant() -> None:
    scenarios = policies.scenarios_of(FigureOptions(100), [0], {"headroom": 0.2})

    candidates = [one.scenario for one in scenarios if one.series == policies.CANDIDATE]
    assert len(candidates) == len(policies.TRACES)
    assert all(one.policy == "llumnix" and one.overrides == {"headroom": 0.2} for one in candidates)


@pytest.mark.usefixtures("in_this_process")
def test_a_table_with_the_gains_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "TRACES", {"S-S at 36/s": ("s-s", 36.0)})

    policies.run_policies(FigureOptions(120), [0], ExperimentRun(tmp_path, jobs=1))

    text = (tmp_path / "policies.md").read_text(encoding="utf-8")
    assert "better than the paper's Llumnix by: one line: Prefill P99" in text
    assert "Prefill P99, long prompts (s), our defaults" in text
    assert "Left out (requests), our defaults" in text
    assert len(list((tmp_path / "runs").glob("*.json"))) == len(policies.VARIANTS)


def test_the_gain_is_the_geometric_mean_over_seeds() -> None:
    points = [
        FigurePoint("trace", variant, metric, x, ours=value)
        for metric in ("Prefill P99", "Prefill Mean", "Request P99")
        for x, values in ((0.0, (8.0, 4.0, 2.0, 1.0)), (1.0, (8.0, 1.0, 2.0, 1.0)))
        for variant, value in zip(policies.VARIANTS, values, strict=True)
    ]

    [line] = policies._findings(points)

    assert "one line: Prefill P99 4.00 x" in line
    assert "our defaults: Prefill P99 8.00 x" in line
