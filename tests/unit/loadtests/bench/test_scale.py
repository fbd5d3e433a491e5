"""The benchmark of many instances, with a few."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from loadtests.bench import scale
from loadtests.bench.report import BenchmarkReport


def test_a_quarter_of_the_loads_are_those_of_prefill_instances() -> None:
    loads = scale.busy_loads(16, Random(0))

    assert Counter(load.role for load in loads) == {"prefill": 4, "decode": 12}
    assert len({load.instance_id for load in loads}) == 16


async def test_rounds_dispatches_and_reports_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"SIZES": (8,), "ROUNDS": 3, "DISPATCHES": 5, "SECONDS": 0.2, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(scale, name, value)

    await scale.run(BenchmarkReport(tmp_path / "scale.json"))

    (row,) = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert row["instances"] == 8
    assert row["round_ms"] > 0
    assert row["dispatch_ms"] > 0
    assert row["handoff_ms"] > 0
    assert {"scheduler_share", "api_server_share"} <= row.keys()
