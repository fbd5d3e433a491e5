"""The JSON file of a benchmark."""

import json
from pathlib import Path

from loadtests.bench.report import BenchmarkReport


def test_the_file_has_the_numbers_and_the_provenance(tmp_path: Path) -> None:
    report = BenchmarkReport(tmp_path / "bench.json")
    report.provenance["versions"] |= {"router": "1.0"}

    report.write({"ratio": 1.0})
    report.write({"ratio": 2.0})

    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["ratio"] == 2.0
    assert written["versions"]["router"] == "1.0"
    assert {"command", "commit", "machine", "at"} <= set(written)


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    BenchmarkReport(None).write({"ratio": 1.0})

    assert list(tmp_path.iterdir()) == []
