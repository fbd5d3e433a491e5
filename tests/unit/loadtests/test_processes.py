"""Processes of a service."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from loadtests.processes import ProcessKind, ServiceProcesses, is_alive, kind_of

#: Starts a child, which prints its process id when it runs, and waits.
PARENT = """
import subprocess, sys
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
child.wait()
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A process and its child."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    yield parent, child
    for process in (child, psutil.Process(parent.pid) if parent.poll() is None else child):
        if is_alive(process):
            process.kill()
    parent.stdout.close()
    parent.wait()


@pytest.mark.parametrize(
    ("name", "command", "kind"),
    [
        ("python", ["python", "/x/bin/pd-serve", "serve", "tiny"], ProcessKind.MANAGER),
        ("pd-serve", ["/x/bin/pd-serve", "serve", "tiny"], ProcessKind.MANAGER),
        (
            "python",
            ["python", "-P", "-m", "pd_serve.launch.api_server_process", "5", "6", "7"],
            ProcessKind.API_SERVER,
        ),
        ("python", ["python", "/x/bin/pd-serve", "status"], ProcessKind.OTHER),
        ("ray::InstanceAc", ["ray::InstanceActor.wait"], ProcessKind.INSTANCE),
        ("ray::SchedulerA", ["ray::SchedulerActor"], ProcessKind.SCHEDULER),
        ("ray::ServeRepli", ["ray::ServeReplica:pd-serve:InstanceManager"], ProcessKind.MANAGER),
        ("ray::ServeRepli", ["ray::ServeReplica:pd-serve:ApiServer"], ProcessKind.API_SERVER),
        ("ray::ServeContr", ["ray::ServeController"], ProcessKind.OTHER),
        ("raylet", ["/x/raylet", "--node_id"], ProcessKind.RAYLET),
        ("haproxy", ["haproxy", "-f", "x"], ProcessKind.HAPROXY),
        ("gone", [], ProcessKind.OTHER),
    ],
)
def test_kinds_of_processes(name: str, command: list[str], kind: ProcessKind) -> None:
    assert kind_of(name, command) is kind


def test_a_child_is_known_after_the_end_of_its_parent(
    family: tuple[subprocess.Popen[bytes], psutil.Process],
) -> None:
    parent, child = family
    processes = ServiceProcesses(parent.pid)
    assert {process.pid for process in processes.alive()} == {parent.pid, child.pid}

    parent.kill()
    parent.wait()

    assert [process.pid for process in processes.alive()] == [child.pid]
    assert processes.send(child, signal.SIGKILL)
    child.wait(10)
    assert processes.alive() == []


def test_a_process_of_another_service_is_never_signalled(
    family: tuple[subprocess.Popen[bytes], psutil.Process],
) -> None:
    parent, child = family
    processes = ServiceProcesses(child.pid)
    processes.alive()

    with pytest.raises(ValueError, match="not one of the service's"):
        processes.send(psutil.Process(parent.pid), signal.SIGKILL)

    assert parent.poll() is None


def test_a_signal_to_an_ended_process_is_not_sent(
    family: tuple[subprocess.Popen[bytes], psutil.Process],
) -> None:
    parent, _ = family
    processes = ServiceProcesses(parent.pid)
    (root,) = [process for process in processes.alive() if process.pid == parent.pid]
    parent.kill()
    parent.wait()

    assert not processes.send(root, signal.SIGCONT)
    assert root not in processes.alive()
    assert not processes.send(root, signal.SIGCONT)


def test_stopped_processes_are_resumed(family: tuple[subprocess.Popen[bytes], psutil.Process]) -> None:
    parent, child = family
    processes = ServiceProcesses(parent.pid)
    processes.alive()
    processes.send(child, signal.SIGSTOP)
    while child.status() != psutil.STATUS_STOPPED:
        pass

    processes.resume_all()

    while child.status() == psutil.STATUS_STOPPED:
        pass


def test_usage_of_each_process(family: tuple[subprocess.Popen[bytes], psutil.Process]) -> None:
    parent, child = family

    usage = ServiceProcesses(parent.pid).usage()

    assert usage.keys() == {parent.pid, child.pid}
    kind, used = usage[child.pid]
    assert kind is ProcessKind.OTHER
    assert used.memory_mib > 1
    assert used.descriptors >= 3
    assert used.threads >= 1


def test_a_process_of_the_session_whose_parent_has_ended_unseen_is_ended_too() -> None:
    leader = PARENT.replace("child.wait()", "sys.stdin.read()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    root = subprocess.Popen([sys.executable, "-c", leader], start_new_session=True, **pipes)
    assert root.stdin is not None
    assert root.stdout is not None
    processes = ServiceProcesses(root.pid)
    orphan = psutil.Process(int(root.stdout.readline()))
    root.stdin.close()
    root.wait()
    assert is_alive(orphan)

    processes.kill_all()

    psutil.wait_procs([orphan], timeout=10.0)
    assert not is_alive(orphan)
    root.stdout.close()
