"""Where disaggregation wins: the rows, from a small plan to the simulated cluster, and their table."""

import json
from pathlib import Path

import pytest

from loadtests.experiments import layouts
from loadtests.experiments.layouts import BestLayout, HardwareRow
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.planning.fast_cluster import Layout
from pd_serve.planning.search import LayoutPlan
from router.slo import Slo

COST_MODEL = "h100-llama-3.1-8b"


def test_the_best_of_both_kinds_run_in_the_simulated_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "HARDWARE", {COST_MODEL: (2, {"tight": Slo(0.5, 0.05)})})
    monkeypatch.setattr(layouts, "TRACES", {"2,000:20": "2000:20"})

    monkeypatch.setattr(layouts, "LEAST_S", 5.0)

    layouts.run_layouts(60, ExperimentRun(tmp_path, jobs=1))

    [row] = json.loads((tmp_path / "layouts.json").read_text(encoding="utf-8"))["rows"]
    assert row["disaggregated"]["layout"] == row["wrong_split"]["layout"] == "1 + 1"
    assert row["aggregated"]["goodput"] > row["disaggregated"]["goodput"] > 0  # prompts are nearly all work
    assert row["aggregated"]["attainment"] > row["disaggregated"]["attainment"]
    assert "| 2: h100-llama-3.1-8b | 2,000:20 |" in (tmp_path / "layouts.md").read_text(encoding="utf-8")


def test_the_wrong_split_is_the_worst_with_its_better_chunk_size() -> None:
    plans = [
        LayoutPlan(Layout(prefill=prefill, decode=4 - prefill, chunk_tokens=chunk), goodput)
        for prefill, chunk, goodput in ((2, 1, 9.0), (1, 1, 7.0), (3, 2, 6.0), (1, 2, 2.0), (2, 2, 1.0))
    ]

    assert layouts._wrong_split(plans).goodput == 6.0


def test_a_target_that_no_layout_meets_has_no_gain_and_no_simulation() -> None:
    none = BestLayout("no chunks", 0.0)

    table = layouts.markdown(
        [HardwareRow(COST_MODEL, "l-l", "tight", Slo(0.1, 0.001), none, none, none, none, 3)]
    )

    assert table.endswith(
        "| l-l (3 left out) | 0.1 s, 1 ms | 0.0 | 0.0 (no chunks) | 0.0 (no chunks) | - |"
        " 0.0 (no chunks) | -, - |\n"
    )
