"""A real child process, of a module that imports no vLLM, in the hands of its parent."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from pd_serve.comm.wire import CurveKeys
from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch import api_server_child
from pd_serve.launch.api_server_child import SpawnedApiServer
from pd_serve.launch.api_server_messages import ApiServerSettings, JoinCluster
from pd_serve.launch.preparation import ModelSource
from tests.environment import START_ENVIRONMENT
from tests.unit.pd_serve.launch import played_api_server

ROOT = str(Path(__file__).parents[4])
CLUSTER = JoinCluster("127.0.0.1", "tcp://manager")

Start = Callable[..., Awaitable[SpawnedApiServer]]


async def spawn(name: str, sock: socket.socket) -> SpawnedApiServer:
    settings = ApiServerSettings(
        name, ServeConfig(port=1234), ModelSource("tiny", {}), CurveKeys(b"public", b"a-secret-of-mine")
    )
    return await SpawnedApiServer.start(settings, sock, os.getpid())


@pytest.fixture
def sock() -> socket.socket:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch, sock: socket.socket) -> AsyncIterator[Start]:
    monkeypatch.setattr(api_server_child, "api_server_process", played_api_server)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    started: list[SpawnedApiServer] = []

    async def start(name: str) -> SpawnedApiServer:
        started.append(await spawn(name, sock))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        await child.ended()
    sock.close()


async def test_two_serve_one_port_and_the_death_of_one_takes_no_connection_from_the_other(
    start: Start, sock: socket.socket
) -> None:
    children = [await start("one"), await start("two")]
    flags = [await child.flags() for child in children]
    assert flags[0].manager_config == 1234
    assert {one.served_model_name for one in flags} == {"secret is seen: False"}
    for child in children:
        await child.join(CLUSTER)

    os.kill(children[0].pid, 19)  # SIGSTOP: it accepts nothing more
    for _ in range(20):
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        async with asyncio.timeout(30):
            assert await reader.read() == b""  # accepted, and closed by the other one
        writer.close()
    children[0].kill()
    assert await children[0].ended() == "was killed by SIGKILL"
    assert await children[0].ended() == "was killed by SIGKILL", "and again"


async def test_its_errors_are_raised_with_their_class(start: Start) -> None:
    with pytest.raises(InvalidRequestError, match=r"^--dtype: no such type$"):
        await (await start("invalid")).flags()
    with pytest.raises(PdServeError, match=r"^the API server was killed by SIGKILL$") as raised:
        await (await start("dies")).flags()
    assert not isinstance(raised.value, InvalidRequestError)


async def test_its_last_error_is_the_reason_of_its_end(start: Start) -> None:
    child = await start("fails later")
    await child.flags()
    await child.join(CLUSTER)

    assert await child.ended() == "has ended: the engine client has stopped"


async def test_one_that_hangs_at_its_start_is_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server_child, "API_SERVER_START_S", 0.2)
    child = await start("hangs")

    with pytest.raises(PdServeError, match="has not started within"):
        await child.flags()


async def test_it_ends_when_asked_and_one_that_does_not_is_killed(start: Start) -> None:
    child, stubborn = await start("one"), await start("stubborn")
    for each in (child, stubborn):
        await each.flags()
        await each.join(CLUSTER)
        each.terminate()

    assert await child.ended() == "was killed by SIGTERM"  # this one has no handler
    assert psutil.pid_exists(stubborn.pid)
    stubborn.kill()
    assert await stubborn.ended() == "was killed by SIGKILL"
    stubborn.terminate()  # it has ended: nothing happens


def test_it_ends_with_its_parent_also_while_it_is_stopped() -> None:
    parent = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**START_ENVIRONMENT, "PYTHONPATH": ROOT},
    )
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        child.suspend()
        parent.kill()
        assert not psutil.wait_procs([child], timeout=60)[1]
    finally:
        parent.kill()
        parent.communicate()


async def _be_a_parent() -> None:
    api_server_child.api_server_process = played_api_server  # type: ignore[misc]
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    child = await spawn("one", sock)
    await child.flags()
    print(child.pid, flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(_be_a_parent())
