"""The commands that try faults, mutated frames and mixed load, each on a small cluster for some seconds."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import ROOT, run_command

#: Steps of milliseconds, so that the tests take seconds.
FAST = ("--engine", "simulated", "--cost-model", str(ROOT / "results" / "profile-tiny.csv"))

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "PD_SERVE_FAULT_TESTS" not in os.environ, reason="`make faults` runs them, in ten minutes"
    ),
]


async def run(module: str, out: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, output)."""
    command = (sys.executable, "-m", module, *arguments, "--seed", "1", "--out", str(out))
    return await run_command(*command, bound_s=850.0, environment={"PYTHONPATH": str(ROOT)})


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


async def test_streams_survive_kills_and_freezes(tmp_path: Path) -> None:
    small = ("--prefill", "1", "--decode", "2", "--streams", "6", "--references", "8")
    code, output = await run(
        "loadtests.chaos", tmp_path, "--kills", "4", "--duration", "12s", "--no-restart", *small, *FAST
    )

    assert code == 0, output
    found = report(tmp_path)
    assert (found["summary"]["faults"], found["summary"]["failed"], found["problems"]) == (4, 0, [])
    assert found["summary"]["tokens"] > 1000
    assert "4/4" in output
    assert "data:image/svg+xml;base64," in (tmp_path / "report.html").read_text()


async def test_mutated_frames_change_nothing(tmp_path: Path) -> None:
    code, output = await run("loadtests.fuzz", tmp_path, "--frames", "4000")

    assert code == 0, output
    found = report(tmp_path)
    assert sum(found["frames"].values()) >= 4000
    assert set(found["frames"]) == {"zmtp", "http", "grpc", "silent"}
    assert found["problems"] == []


async def test_a_mixed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    code, output = await run("loadtests.soak", tmp_path, "--duration", "20s", "--streams", "4", *FAST[:2])

    assert code == 0, output
    found = report(tmp_path)
    assert found["streams"] > 0
    assert found["variants"]["abort"] > 0
    assert {row["kind"] for row in found["usage"]} >= {"manager", "api server", "instance", "scheduler"}
