"""The comparison of policies: a few small runs for real, and what is said of them."""

from pathlib import Path

import pytest

from loadtests.experiments import ablation
from loadtests.experiments.paper.figure import Point


def test_every_variant_runs_on_every_trace_with_every_seed() -> None:
    runs = ablation.runs_of(100, [0, 1], list(ablation.TRACES))

    assert len(runs) == len(ablation.TRACES) * 2 * len(ablation.VARIANTS)
    assert {case.trace.seed for _, case in runs} == {0, 1}
    assert len({case.key for _, case in runs}) == len(runs)


def test_it_writes_a_table_and_what_was_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "TRACES", {"S-S at 36/s": ("s-s", 36.0)})

    ablation.run(tmp_path, 120, [0], jobs=1, fresh=False)

    text = (tmp_path / "policies.md").read_text(encoding="utf-8")
    assert "better than the paper's Llumnix by: one line: Prefill P99" in text
    assert len(list((tmp_path / "runs").glob("*.json"))) == len(ablation.VARIANTS)


def test_the_gain_is_the_geometric_mean_over_seeds() -> None:
    points = [
        Point("trace", variant, metric, x, ours=value)
        for metric in ("Prefill P99", "Prefill Mean", "Request P99")
        for x, values in ((0.0, (8.0, 4.0, 2.0, 1.0)), (1.0, (8.0, 1.0, 2.0, 1.0)))
        for variant, value in zip(ablation.VARIANTS, values, strict=True)
    ]

    [line] = ablation._findings(points)

    assert "one line: Prefill P99 4.00 x" in line
    assert "our defaults: Prefill P99 8.00 x" in line
