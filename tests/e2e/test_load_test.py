"""Locust in its own process against a cluster of simulated engines, while one of them is drained."""

import asyncio
import itertools
import json
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, run_command
from tests.e2e.completion_client import CompletionClient
from tests.e2e.server_process import ServerProcess


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


async def locust(server: ServerProcess, report: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, output)."""
    command = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    load = ["--host", server.url, "--trace", "s-s", "--max-tokens", "80", "--report", str(report)]
    return await run_command(
        sys.executable, *command, *load, *arguments, environment={"PYTHONPATH": str(ROOT)}
    )


async def test_every_stream_is_correct_while_requests_move(
    server: ServerProcess, client: CompletionClient, tmp_path: Path
) -> None:
    ended = asyncio.Event()

    async def drain_in_turns() -> None:
        """From the first requests on, until the load has ended."""
        before = (await client.cluster())["migrations"]["handoff"]["committed"]
        await client.until(lambda seen: seen["migrations"]["handoff"]["committed"] > before, 120)
        for name in itertools.cycle(("decode-0", "decode-1")):
            if ended.is_set():
                return
            await client.drain(name)
            try:
                await asyncio.sleep(0.5)
            finally:
                await client.drain(name, draining=False)
            await client.until(lambda seen: not any(row["draining"] for row in seen["instances"]))
            await asyncio.sleep(0.2)

    lengths = ("--trace", "s-l", "--max-tokens", "200")
    arguments = (*lengths, "--rate", "8", "--requests", "60", "--shape", "spike", "--high-priority", "0.2")
    drains = asyncio.create_task(drain_in_turns())
    try:
        code, output = await locust(server, tmp_path / "report.json", *arguments, "--check", "simulated")
    finally:
        ended.set()
    await drains
    assert code == 0, output
    result = json.loads((tmp_path / "report.json").read_text())
    assert (result["summary"]["ended"], result["summary"]["failed"]) == (60, 0)
    assert {row["api"] for row in result["requests"]} == {"chat", "completions"}
    assert all(row["ttft_s"] > 0 for row in result["requests"])
    migrations = (await client.cluster())["migrations"]
    # One may end on its prefill instance while a decode instance is drained.
    assert migrations["handoff"]["committed"] >= 30
    assert migrations["drain"]["committed"] > 0


async def test_a_missed_slo_sets_exit_code_3(
    server: ServerProcess, client: CompletionClient, tmp_path: Path
) -> None:
    slo = ("--slo", "ttft=1ms,tpot=1ms", "--goodput", "0.5", "--max-tokens", "20")
    code, output = await locust(server, tmp_path / "report.json", "--rate", "20", "--requests", "5", *slo)
    assert code == 3, output
    result = json.loads((tmp_path / "report.json").read_text())
    assert (result["check"], result["summary"]["failed"], result["summary"]["goodput"]["good"]) == (
        "simulated",
        0,
        0,
    )
