"""Samples of a service, and the ends of its processes."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from loadtests.answer import StreamError
from loadtests.chaos import monitor
from loadtests.chaos.monitor import ServiceMonitor
from loadtests.processes import ProcessKind, ServiceProcesses
from loadtests.stream_client import AsyncStreamClient


class FlakyClient(AsyncStreamClient):
    """Fails every second time."""

    def __init__(self) -> None:
        super().__init__("http://localhost")
        self.asked = 0

    async def json(self, path: str, body: object = None, timeout_s: float = 0.0) -> dict[str, int]:
        self.asked += 1
        if self.asked % 2 == 0:
            raise StreamError("HTTP 503")
        return {"number": self.asked}


async def test_failed_samples_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SAMPLE_S", 0.0)
    client = FlakyClient()
    watch = ServiceMonitor(client, ServiceProcesses(), lambda: 1.0)
    assert watch.cluster == {}

    sampling = asyncio.create_task(watch.sample())
    while client.asked < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    sampling.cancel()

    assert [sample.cluster["number"] for sample in watch.samples][:2] == [1, 3]
    assert watch.cluster["number"] >= 3


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


async def test_ended_processes_are_noted(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "POLL_S", 0.01)
    watch = ServiceMonitor(FlakyClient(), ServiceProcesses(process.pid), lambda: 3.0)
    watching = asyncio.create_task(watch.watch_processes())
    await asyncio.sleep(0.1)

    process.kill()
    process.wait()
    while not watch.deaths:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    watching.cancel()

    assert [(death.at_s, death.pid) for death in watch.deaths] == [(3.0, process.pid)]


async def test_a_process_that_ends_keeps_its_kind_when_its_command_line_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class EndingProcesses:
        def __init__(self) -> None:
            known, ending = (
                [(SimpleNamespace(pid=7), kind)] for kind in (ProcessKind.API_SERVER, ProcessKind.OTHER)
            )
            self.looks = [known, ending, []]

        def kinds(self) -> list[tuple[SimpleNamespace, ProcessKind]]:
            return self.looks.pop(0) if self.looks else []

    monkeypatch.setattr(monitor, "POLL_S", 0.001)
    watch = ServiceMonitor(FlakyClient(), EndingProcesses(), lambda: 3.0)  # type: ignore[arg-type]
    watching = asyncio.create_task(watch.watch_processes())
    while not watch.deaths:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    watching.cancel()

    assert [(death.kind, death.pid) for death in watch.deaths] == [(ProcessKind.API_SERVER, 7)]
