"""Scripts that run in processes forked from one that has imported their modules."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pd_serve.platform.fork_server import ForkServer
from tests.environment import START_ENVIRONMENT

#: A module that only the fork server imports.
MODULE = "colorsys"

SCRIPT = """
import json, os, sys, time
print(json.dumps({
    "arguments": sys.argv[1:], "name": __name__, "imported": "colorsys" in sys.modules, "pid": os.getpid(),
    "place": os.getcwd(), "colour": os.environ.get("COLOUR"), "server": "SERVER" in os.environ,
    "read": sys.stdin.readline().strip(),
}), flush=True)
if "stay" in sys.argv:
    time.sleep(600)
"""

TIME_S = 60.0


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ForkServer]]:
    started: list[ForkServer] = []
    monkeypatch.setenv("SERVER", "1")

    def start(*modules: str) -> ForkServer:
        started.append(ForkServer(modules or (MODULE,)))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module whose import ends when the file is removed."""
    blocker = tmp_path / "blocker"
    blocker.touch()
    (tmp_path / "slow_module.py").write_text(
        f"import pathlib, time\nwhile pathlib.Path({str(blocker)!r}).exists(): time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield blocker
    blocker.unlink(missing_ok=True)


Client = subprocess.Popen[str]


@pytest.fixture
def run(script: Path) -> Iterator[Callable[..., Client]]:
    """Starts the script with arguments by a command in the place of Python's, as Ray does."""
    started: list[Client] = []

    def run(python: str, *arguments: str) -> Client:
        client = subprocess.Popen(
            ["bash", "-c", f"exec {python} {shlex.join([str(script), *arguments])}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=script.parent,
            env={**START_ENVIRONMENT, "COLOUR": "blue"},
        )
        started.append(client)
        assert client.stdin is not None
        client.stdin.write("hello\n")
        client.stdin.flush()
        return client

    yield run
    for client in started:
        client.kill()
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.close()
        client.stdout.close()
        client.wait()


def said(client: Client) -> dict[str, object]:
    assert client.stdout is not None
    answer: dict[str, object] = json.loads(client.stdout.readline())
    return answer


def name_of(server: ForkServer) -> str:
    return shlex.split(server.python)[-1]


def test_a_script_runs_in_a_forked_process_as_it_was_started(
    start: Callable[..., ForkServer], run: Callable[..., Client], script: Path
) -> None:
    client = run(start().python, "a b", "c")
    answer = said(client)
    assert client.wait(TIME_S) == 0

    assert answer.pop("pid") != client.pid
    assert answer == {
        "arguments": ["a b", "c"],
        "name": "__main__",
        "imported": True,
        "place": str(script.parent),
        "colour": "blue",
        "server": False,
        "read": "hello",
    }


def test_scripts_wait_for_the_imports(
    start: Callable[..., ForkServer], run: Callable[..., Client], slow_module: Path
) -> None:
    server = start("slow_module", MODULE)
    client = run(server.python)
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(0.3)
    slow_module.unlink()
    server.wait()

    assert said(client)["imported"]


def test_a_script_whose_client_has_ended_does_not_run(
    start: Callable[..., ForkServer], run: Callable[..., Client], slow_module: Path
) -> None:
    """Ray starts another process in its place."""
    server = start("slow_module", MODULE)
    client = run(server.python)
    time.sleep(0.5)
    client.kill()
    client.wait()
    slow_module.unlink()
    assert said(run(server.python))["imported"]  # after the first one

    assert client.stdout is not None
    assert client.stdout.read() == ""


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_without_a_server_the_script_runs_by_itself(
    start: Callable[..., ForkServer], run: Callable[..., Client], slow_module: Path, moment: str
) -> None:
    server = start("slow_module")
    if moment == "before":
        server._process.kill()
        server._process.wait()
    client = run(server.python, "x")
    if moment == "meanwhile":
        time.sleep(0.5)
        server._process.kill()
    answer = said(client)
    assert answer["arguments"] == ["x"]
    assert not answer["imported"]
    assert answer["pid"] == client.pid


def test_a_server_that_cannot_import_ends_and_says_so(
    start: Callable[..., ForkServer], run: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    server = start("there_is_no_such_module")
    server.wait()
    assert "the fork server has ended" in caplog.text
    assert said(run(server.python))["read"] == "hello"


def test_forked_processes_go_on_without_the_server_and_are_reaped(
    start: Callable[..., ForkServer], run: Callable[..., Client]
) -> None:
    server = start()
    short, long = (int(str(said(run(server.python, *how))["pid"])) for how in ([], ["stay"]))
    deadline = time.monotonic() + TIME_S
    while psutil.pid_exists(short):  # a zombie would exist, too
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server._process.kill()
    server._process.wait()

    assert psutil.Process(long).is_running()
    os.kill(long, signal.SIGKILL)


def test_a_server_that_is_stopped_delays_a_script_only(
    start: Callable[..., ForkServer], run: Callable[..., Client]
) -> None:
    """The script runs once, also when the server goes on and finds the order of a client that is gone."""
    server = start()
    server.wait()
    server._process.send_signal(signal.SIGSTOP)
    client = run(server.python, "x")
    assert said(client)["pid"] == client.pid  # after `ANSWER_S`
    server._process.send_signal(signal.SIGCONT)
    assert said(run(server.python))["imported"]  # the order of the first client was before this one

    assert client.stdout is not None
    assert client.stdout.read() == ""


@pytest.mark.parametrize("nonsense", [b"", b"no order", b'{"argv": []}', b"[" * 5_000_000])
def test_nonsense_is_refused_and_the_server_goes_on(
    start: Callable[..., ForkServer], run: Callable[..., Client], nonsense: bytes
) -> None:
    server = start()
    server.wait()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIME_S)
        connection.connect(f"\0{name_of(server)}")
        try:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has read enough
    assert said(run(server.python))["imported"]


def test_the_server_ends_with_its_parent() -> None:
    program = (
        "from pd_serve.platform.fork_server import ForkServer; import time; server = ForkServer(['json']);"
        "server.wait(); print(server._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**START_ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[4])},
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([server], timeout=TIME_S)[1]
