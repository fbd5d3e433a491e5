"""`pd-serve serve` when it cannot serve, or no longer: one clear line, an exit code, nothing left running."""

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.server_process import ServerProcess, pd_serve

END_S = 120.0
PROGRESS = re.compile(r"\s*\d+\.\d s  ")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        started.append(ServerProcess(pd_serve("serve", *arguments), tmp_path / f"{len(started)}.log"))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def complaint(server: ServerProcess) -> str:
    """Waits for the end. Returns the one line beside progress."""
    left = server.wait_gone(END_S)
    assert not left, f"{left}\n{server.tail()}"
    assert server.process.returncode not in (0, None)
    lines = [line for line in server.tail().splitlines() if line.strip() and not PROGRESS.match(line)]
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["tiny", "--max-model-length", "9"],
            "unknown flag --max-model-length; did you mean --max-model-len?",
        ),
        (["tiny", "--kv-cache-memory-bytes", "9000000000000"], "smaller --kv-cache-memory-bytes"),
        (
            ["tiny", "--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
            "start with --neutral, or with --allow-no-migration",
        ),
        (["tiny", "--prefill", "two"], "'--prefill'"),
        (["tiny", "--prefill", "1", "--decode", "0"], "--decode"),
        (["tiny", "--neutral", "0", "--prefill", "0", "--decode", "0"], "--neutral"),
        (["tiny", "--autoscale-decode", "3:1"], "--autoscale-decode: 3:1: must be 1 <= MIN <= MAX"),
        (["--decode", "2", "tiny", "other"], "unexpected argument 'other'; MODEL is 'tiny' already"),
        (["tiny", "--ray-address", "127.0.0.1:1"], "no Ray cluster answers at --ray-address 127.0.0.1:1 ("),
        (["tiny", "--policy", "fastest"], "no policy 'fastest'; there are round-robin"),
        (["./there/is/no/such/model"], "./there/is/no/such/model"),
    ],
)
def test_a_refused_command_line_is_one_clear_line(
    start: Callable[..., ServerProcess], arguments: list[str], says: str
) -> None:
    line = complaint(start(*arguments, "--port", "0"))
    assert line.startswith("error ")
    assert says in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "neither known nor a file; known: a10-llama-7b"),
        ("phase,ms\ndecode,1\n", "steps.csv must have the columns phase,batch_size,"),
        (
            "phase,batch_size,new_tokens,context_tokens,ms\ndecode,1,1,1,fast\n",
            "steps.csv: a row cannot be read",
        ),
    ],
)
def test_a_cost_model_that_cannot_be_read_is_one_clear_line(
    start: Callable[..., ServerProcess], tmp_path: Path, content: str | None, says: str
) -> None:
    steps = tmp_path / "steps.csv"
    if content is not None:
        steps.write_text(content)
    assert says in complaint(start("tiny", "--engine", "simulated", "--cost-model", str(steps)))


def test_a_busy_port_is_one_clear_line(start: Callable[..., ServerProcess]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in complaint(start("tiny", "--port", str(port)))


@pytest.mark.parametrize("moment", ["loading vLLM", "instances$"])
def test_an_interrupted_start_leaves_nothing(start: Callable[..., ServerProcess], moment: str) -> None:
    server = start("tiny", "--port", "0")
    deadline = time.monotonic() + END_S
    while not re.search(moment, server.tail(), re.MULTILINE):
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.05)
    time.sleep(1.5)
    left = server.signal_and_wait(signal.SIGINT)
    assert not left, f"{left}\n{server.tail()}"
    assert "Traceback" not in server.tail()


def test_a_service_whose_raylet_has_ended_ends(start: Callable[..., ServerProcess]) -> None:
    server = start("tiny", "--engine", "simulated", "--neutral", "1", "--api-servers", "1", "--port", "0")
    server.wait_ready()
    for child in psutil.Process(server.process.pid).children():
        if child.name() == "raylet":
            child.kill()

    left = server.wait_gone(END_S)

    assert not left, f"{left}\n{server.tail()}"
    assert server.process.returncode == 1
    assert "error  Ray has ended, and all instances with it" in server.tail()
