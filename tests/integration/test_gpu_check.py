"""`make gpu-check` without a GPU: its smallest case for real, and how it treats cases that fail."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.cases import CASES, Case
from tests.gpu.check import chosen, run_cases

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.skipif("PD_SERVE_ALL_KINDS" not in os.environ, reason="`make kinds` runs it, in a minute")
def test_the_smallest_case_passes_in_a_dry_run(tmp_path: Path) -> None:
    """One import of vLLM, and two engines with the tiny model."""
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "tests.gpu.check", "--device", "cpu", "--case", "tiny", "--out", out]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert found["passed"]
    case = found["cases"]["tiny"]
    assert case["instances"]["memory"] == "host"
    there, back = case["trials"]["moved there and back, greedy"]["moves"]
    assert there["bytes_copied"] > back["bytes_copied"] > 0, "the first instance had the prompt's blocks"
    assert case["trials"]["handed off during its prompt"]["tokens_at_source"] < 20
    assert case["trials"]["without one block"] == {"differs": True}


def test_a_case_that_fails_or_hangs_does_not_end_the_others() -> None:
    async def run(case: Case, device: str) -> dict[str, Any]:
        if case.name == "wrong":
            raise AssertionError("token 3 differs")
        if case.name == "hangs":
            await asyncio.Event().wait()
        return {"trials": {}}

    cases = [Case("wrong"), Case("hangs"), Case("measures", lengths=(1,)), Case("right")]
    results = asyncio.run(run_cases(cases, "cpu", 1, 0.05, run=run))

    assert {name: result["passed"] for name, result in results.items()} == {
        "wrong": False,
        "hangs": False,
        "measures": True,
        "right": True,
    }
    assert results["wrong"]["error"] == "AssertionError: token 3 differs"
    assert results["hangs"]["error"] == "it took more than 0.05 s"


def test_cases_that_measure_are_alone() -> None:
    running: set[str] = set()
    seen: list[set[str]] = []

    async def run(case: Case, device: str) -> dict[str, Any]:
        running.add(case.name)
        await asyncio.sleep(0)
        seen.append(set(running))
        running.discard(case.name)
        return {}

    cases = [Case("measures", lengths=(1,)), Case("one"), Case("other")]
    asyncio.run(run_cases(cases, "cpu", 2, 10, run=run))

    assert {"one", "other"} in seen
    assert [names for names in seen if "measures" in names] == [{"measures"}]


def test_the_dry_run_says_what_it_leaves_out() -> None:
    cases, left_out = chosen([], "cpu")

    assert {case.name for case in cases} | set(left_out) == {case.name for case in CASES}
    assert all(left_out.values())
    assert chosen([], "cuda") == (CASES, {})
    with pytest.raises(SystemExit, match="no such case: tinny"):
        chosen(["tinny"], "cpu")


def test_a_run_has_a_time_limit_too() -> None:
    async def run(case: Case, device: str) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    begin = time.monotonic()
    cases = [Case(str(number)) for number in range(3)]
    results = asyncio.run(run_cases(cases, "cuda", 1, 60, begin + 0.05, run))

    assert not any(result["passed"] for result in results.values())
    assert results["2"]["error"] == "it took more than 0 s"
