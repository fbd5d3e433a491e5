"""The whole load test in its own process, against a server with known faults."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.environment import START_ENVIRONMENT
from tests.integration.fake_model_server import Chunks, FakeModelServer

ROOT = Path(__file__).parents[2]
LOAD = ("--trace", "s-s", "--rate", "40", "--requests", "40", "--max-tokens", "30", "--warm-up", "2")

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[FakeModelServer]:
    with FakeModelServer().running() as server:
        yield server


def locust(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "loadtests/locustfile.py",
        "--headless",
        "--only-summary",
    ]
    environment = START_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def drop(chunks: Chunks) -> None:
    del chunks[2]


def repeat(chunks: Chunks) -> None:
    chunks.insert(3, chunks[2])


def swap(chunks: Chunks) -> None:
    one, other = (chunks[n]["choices"][0] for n in (4, 5))
    assert one["token_ids"] != other["token_ids"]
    one["token_ids"], other["token_ids"] = other["token_ids"], one["token_ids"]


def cut(chunks: Chunks) -> None:
    chunks.insert(3, {"cut": True})


def fail(chunks: Chunks) -> None:
    chunks.insert(3, {"error": {"message": "out of memory"}})


def test_a_good_server_gets_the_planned_requests_and_no_complaint(
    server: FakeModelServer, tmp_path: Path
) -> None:
    """The requests are the planned ones, the CSV has a row for each latency, and all streams are correct."""
    report = tmp_path / "report.json"
    more = (
        "--slo",
        "ttft=60s,tpot=60s",
        "--goodput",
        "1",
        "--high-priority",
        "0.5",
        "--csv",
        str(tmp_path / "t"),
    )
    done = locust("--host", server.url, *LOAD, *more, "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert "40 of 40 requests ended" in done.stdout

    result: dict[str, Any] = json.loads(report.read_text())
    assert (result["check"], result["summary"]["failed"], result["summary"]["goodput"]["share"]) == (
        "simulated",
        0,
        1,
    )
    assert [row["number"] for row in result["requests"]] == list(range(40))
    loaded = server.bodies[2:]  # after the warm-up
    assert sorted(body["priority"] for body in loaded) == [-1] * 20 + [0] * 20
    sent = sorted(len(body["prompt"]) for body in loaded if "prompt" in body)
    assert sent == sorted(r["prompt_tokens"] for r in result["requests"] if r["api"] == "completions")
    assert all(body["ignore_eos"] and body["stream"] for body in loaded)

    rows = {tuple(line.split(",")[:2]) for line in (tmp_path / "t_stats.csv").read_text().splitlines()}
    names = ("TTFT", "TPOT", "ITL", "gap", "E2E")
    assert rows >= {(name, api) for name in names for api in ("completions", "chat")}


def test_each_fault_is_found_and_named(server: FakeModelServer, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    server.faults = {3: drop, 8: repeat, 12: cut, 20: fail, 30: None}
    done = locust(
        "--host", server.url, *LOAD, "--report", str(report), "--check", "simulated", "--api", "completions"
    )
    assert done.returncode == 1, done.stdout
    rows = json.loads(report.read_text())["requests"]
    found = {row["number"]: row["error"] for row in rows if row["error"] is not None}
    assert found.pop(12) in ("the stream was cut off", "connection failed: HTTPParseError")
    assert found == {
        3: "a token is lost",
        8: "a token is repeated",
        20: "the stream ended with an error",
        30: "HTTP 503",
    }


def test_a_different_second_answer_is_found(server: FakeModelServer, tmp_path: Path) -> None:
    """The repeat check finds a difference without knowing the right tokens."""
    report = tmp_path / "report.json"
    more = ("--check", "repeat", "--api", "chat", "--requests", "5", "--report", str(report))
    server.faults = {2: swap}
    done = locust("--host", server.url, *LOAD, *more)
    assert done.returncode == 1, done.stderr
    rows = json.loads(report.read_text())["requests"]
    assert [row["error"] for row in rows] == [None, None, "two tokens are swapped", None, None]


def test_a_missed_slo_sets_exit_code_3(server: FakeModelServer) -> None:
    slo = ("--slo", "e2e=0.001ms", "--goodput", "0.5")
    done = locust("--host", server.url, *LOAD, "--requests", "3", *slo)
    assert done.returncode == 3, done.stderr
    assert "share 0.000 of at least 0.5 wanted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((*LOAD, "--processes", "2"), 2, "one process makes all the load"),
        ((*LOAD, "--worker"), 2, "one process makes all the load"),
        (LOAD, 1, "connection failed: ConnectionRefusedError"),
    ],
)
def test_invalid_options_and_a_missing_server_set_the_exit_code(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = locust("--host", "http://127.0.0.1:9", *arguments)
    assert done.returncode == code
    assert says in done.stderr
