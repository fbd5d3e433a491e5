"""Starts of Ray that fail: what is tried again, what is noticed, and what is left."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private import services

from pd_serve.errors import PdServeError
from pd_serve.manager import ray_start
from pd_serve.manager.ray_start import start_ray


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "PAUSE_S", 0.0)
    monkeypatch.setattr(ray_start, "LOOK_S", 0.01)


class Init:
    """Fails with the given errors, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_start_that_fails_is_repeated_twice(failures: int) -> None:
    init = Init(*[PdServeError("its raylet has ended")] * failures)
    start_ray(init)
    assert init.calls == failures + 1


def test_the_last_error_is_raised() -> None:
    init = Init(*[RuntimeError(f"attempt {number}") for number in (1, 2, 3, 4)])
    with pytest.raises(RuntimeError, match="attempt 3"):
        start_ray(init)


@pytest.mark.parametrize("error", [ValueError("no such address"), TypeError("unexpected argument")])
def test_what_would_fail_again_is_not_repeated(error: Exception) -> None:
    init = Init(error)
    with pytest.raises(type(error)):
        start_ray(init)
    assert init.calls == 1


@pytest.fixture
def raylet(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of this name."""
    program = tmp_path_factory.mktemp("bin") / "raylet"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The nodes that Ray's head knows."""
    nodes: set[str] = set()
    monkeypatch.setattr(ray._raylet, "GcsClient", lambda address: SimpleNamespace())
    monkeypatch.setattr(ray_start, "_is_registered", lambda client, node_id: node_id in nodes)
    monkeypatch.setattr(services, "get_node", lambda address, node_id: f"{node_id} at {address}")
    return nodes


def test_a_raylet_that_ends_is_noticed(raylet: "subprocess.Popen[bytes]", registered: set[str]) -> None:
    threading.Timer(0.1, raylet.kill).start()
    with pytest.raises(PdServeError, match="its raylet has ended"):
        start_ray(lambda: services.get_node("head", "node"))  # as Ray asks for it


def test_a_raylet_that_takes_long_is_waited_for(
    raylet: "subprocess.Popen[bytes]", registered: set[str]
) -> None:
    before, found = services.get_node, []
    threading.Timer(0.1, registered.add, ["node"]).start()
    start_ray(lambda: found.append(services.get_node("head", "node")))
    assert found == ["node at head"]
    assert services.get_node is before


def test_a_failed_start_leaves_no_process_of_ray_and_ends_no_other_one() -> None:
    of_ray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", ray.__file__])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start_ray(Init(RuntimeError("no head")))
        of_ray.wait(5)  # it would sleep for a minute
        assert other.poll() is None
    finally:
        for process in (of_ray, other):
            process.kill()
            process.wait()


def test_a_process_that_ends_without_ray_ends_its_children_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(ray_start, "end_children", lambda timeout_s: ended.append("children"))
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(f"this process with {status}"))
    ray_start.exit_without_ray(3.0)
    assert ended == ["children", "this process with 1"]


def test_a_process_whose_parent_has_ended_is_ended_too() -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=-3).pid)"
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    orphan = psutil.Process(int(found.stdout))
    ray_start.end_children(3.0, lambda process: process == orphan, others=[orphan])
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_ray_lives_while_both_of_its_processes_do(raylet: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    assert not ray_start.ray_lives()
    (tmp_path / "gcs_server").symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / "gcs_server", "60"]) as head:
        try:
            while (
                psutil.Process(head.pid).name() != "gcs_server"
                or psutil.Process(raylet.pid).name() != "raylet"
            ):
                time.sleep(0.01)
            assert ray_start.ray_lives()
        finally:
            head.kill()
    assert not ray_start.ray_lives()
