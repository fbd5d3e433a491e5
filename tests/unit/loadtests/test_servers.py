"""Server processes: equal command lines, failed starts, and their end."""

import asyncio
import os
import sys

import psutil
import pytest

from loadtests.servers import ServerCommand, SharedSettings, all_running, as_flags, free_port, running
from pd_serve.errors import PdServeError

SERVE = (
    "import sys; from http.server import *; "
    "Handler = type('H', (BaseHTTPRequestHandler,), "
    "{'do_GET': lambda self: (self.send_response(200), self.end_headers())}); "
    "HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()"
)
FAIL = "print('starting'); print('no such model'); raise SystemExit(1)"


def script_server(code: str) -> ServerCommand:
    port = free_port()
    return ServerCommand("vllm", [sys.executable, "-c", code, str(port)], port)


def test_settings_become_flags_of_vllm() -> None:
    values = {"block_size": 32, "enforce_eager": True, "use_tqdm_on_load": False, "dtype": "float32"}

    flags = ["--block-size=32", "--enforce-eager", "--no-use-tqdm-on-load", "--dtype=float32"]
    assert as_flags(values) == flags


def test_both_servers_have_the_same_flags() -> None:
    settings = SharedSettings("model-directory", ["--block-size=32", "--dtype=float32"], {"A": "b"})

    ours, stock = settings.ours({"neutral": 1}, 1234), settings.stock(1234)

    assert [flag for flag in ours.command if flag not in stock.command][-2:] == [
        "--neutral=1",
        "--api-servers=1",
    ]
    shared = ["--served-model-name=tiny", "--host=127.0.0.1", "--port=1234", *settings.flags]
    assert ours.command[-5:] == stock.command[-5:] == shared
    assert ours.environment == stock.environment == {"A": "b"}


async def test_a_failed_start_quotes_the_last_line_of_output() -> None:
    with pytest.raises(PdServeError, match=r"vllm did not start.*no such model"):
        async with running(script_server(FAIL)):
            pytest.fail("the server is not ready")


async def test_a_server_ends_with_its_block() -> None:
    async with running(script_server(SERVE)) as server:
        process = server.process
        assert process.is_running()
        assert server.cpu_s() >= server.front_end_cpu_s() > 0

    assert not process.is_running()


async def test_one_failed_start_ends_the_other_servers() -> None:
    with pytest.raises(PdServeError, match="no such model"):
        async with all_running([script_server(SERVE), script_server(FAIL)]):
            pytest.fail("the servers are not ready")

    await asyncio.sleep(0)
    assert not any(SERVE in child.cmdline() for child in psutil.Process(os.getpid()).children())
