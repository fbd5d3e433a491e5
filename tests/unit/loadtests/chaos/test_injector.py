"""Faults, carried out on real processes."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from loadtests.chaos import injector
from loadtests.chaos.injector import FaultInjector
from loadtests.chaos.operations import Operator
from loadtests.chaos.schedule import Fault, Operation, Target
from loadtests.processes import ProcessKind, ServiceProcesses
from loadtests.started_service import ClusterShape, StartedService
from tests.unit.loadtests.chaos.made_run import cluster, instance
from tests.unit.loadtests.chaos.test_operations import RecordingClient


class Instances(ServiceProcesses):
    """All processes are instances."""

    def of_kind(self, kind: ProcessKind) -> list[psutil.Process]:
        return self.alive() if kind is ProcessKind.INSTANCE else []


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def injector_of(processes: list[subprocess.Popen[bytes]]) -> tuple[FaultInjector, RecordingClient]:
    """Of a service with a prefill and a decode instance."""
    first, second = processes
    service = StartedService(
        "", "", ClusterShape({"prefill": 1, "decode": 1}), Instances(first.pid, second.pid), first.pid
    )
    state = cluster(instance("prefill", pid=first.pid), instance("decode", pid=second.pid))
    client = RecordingClient()
    operator = Operator(client, {"prefill": 1, "decode": 1})
    return FaultInjector(service, operator, lambda: state, lambda: ["a"], lambda: 7.0), client


def fault(*targets: Target, freeze_s: float | None = None, during: Operation | None = None) -> Fault:
    return Fault(0, 0.0, targets, freeze_s, during, 0.0, 1)


async def test_two_processes_are_killed_at_once(processes: list[subprocess.Popen[bytes]]) -> None:
    one, _ = injector_of(processes)

    record = await one.carry_out(fault(Target.PREFILL, Target.DECODE))

    assert [process.wait(10) for process in processes] == [-9, -9]
    assert [(hit.target, hit.name) for hit in record.hits] == [
        (Target.PREFILL, "prefill-0"),
        (Target.DECODE, "decode-0"),
    ]
    assert (record.at_s, record.until_s) == (7.0, 7.0)
    assert one.records == [record]


async def test_a_frozen_process_continues(processes: list[subprocess.Popen[bytes]]) -> None:
    one, _ = injector_of(processes)
    process = psutil.Process(processes[1].pid)

    record = await one.carry_out(fault(Target.DECODE, freeze_s=0.2))
    while process.status() != psutil.STATUS_STOPPED:
        pass
    await one.finish()

    while process.status() == psutil.STATUS_STOPPED:
        pass
    assert record.until_s == pytest.approx(7.2)


async def test_the_next_fault_waits_for_a_frozen_process_and_takes_it_when_it_continues(
    processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injector, "POLL_S", 0.05)
    one, _ = injector_of(processes)
    await one.carry_out(fault(Target.DECODE, freeze_s=0.3))

    record = await one.carry_out(fault(Target.DECODE))

    assert [hit.pid for hit in record.hits] == [processes[1].pid]
    assert processes[1].wait(10) == -9


async def test_a_process_that_died_while_frozen_is_no_error(
    processes: list[subprocess.Popen[bytes]],
) -> None:
    one, _ = injector_of(processes)
    await one.carry_out(fault(Target.DECODE, freeze_s=0.1))
    processes[1].kill()
    processes[1].wait()

    await one.finish()


async def test_a_kind_of_process_that_does_not_come_is_missing(
    processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injector, "TARGET_WAIT_S", 0.0)
    one, _ = injector_of(processes)

    record = await one.carry_out(fault(Target.SCHEDULER))

    assert (record.hits, record.missing) == ([], [Target.SCHEDULER])
    assert str(record) == "kill nothing; there was no scheduler"


async def test_an_operation_begins_before_the_fault(processes: list[subprocess.Popen[bytes]]) -> None:
    one, client = injector_of(processes)

    record = await one.carry_out(fault(Target.DECODE, during=Operation.RESTART))

    assert client.posted == [("/cluster/restart", {})]
    assert str(record).endswith("during rolling restart")
