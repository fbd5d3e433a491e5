"""Connections that end while requests are with their handlers, on the event loop of API servers.

`tests/integration/test_api_http_limits.py` has the limits themselves.
"""

import asyncio
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop

from pd_serve.api.http_limits import HttpLimits, LimitedProtocol

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
INVALID = b"not HTTP\r\n\r\n"


class Handler:
    """An application that answers when it is told to, chunk after chunk."""

    def __init__(self, chunks_before: int) -> None:
        self.chunks_before = chunks_before
        self.is_answering = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.heard: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            if self.chunks_before:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(self.chunks_before):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            self.is_answering.set()
            await self.may_go_on.wait()
            if not self.chunks_before:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"y", "more_body": True})
            await send({"type": "http.response.body", "body": b"z", "more_body": False})
            self.heard.append((await receive())["type"])
        finally:
            self.ended.set()


async def served(handler: Handler, behind: bytes, late: bool) -> bytes:
    """What a client gets that sends a request, and then `behind` while it is being answered.

    Args:
        late: Whether the answer goes on after the connection's end.
    """
    protocol: Any = partial(LimitedProtocol, HttpLimits(1000, 10, 10))
    server = uvicorn.Server(uvicorn.Config(handler, http=protocol, lifespan="off", log_config=None, port=0))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn's
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    await handler.is_answering.wait()
    (connection,) = server.server_state.connections
    if late:
        connection.data_received(behind)
        await asyncio.sleep(0.05)
        handler.may_go_on.set()
    else:  # it goes on before the loop tells of the connection's end
        handler.may_go_on.set()
        connection.data_received(behind)
    got = await reader.read()
    await asyncio.wait_for(handler.ended.wait(), 10)
    writer.close()
    server.should_exit = True
    await serving
    return got


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chunks_before", [0, 1])
@pytest.mark.parametrize(
    "behind",
    [INVALID, REQUEST + INVALID, 3 * REQUEST + INVALID, b"GET / HTTP/1.1\r\n" + b"x" * 2000],
    ids=["invalid", "one, invalid", "three, invalid", "long headers"],
)
def test_an_answer_that_comes_after_the_end_is_dropped(
    behind: bytes, chunks_before: int, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> tuple[bytes, list[str]]:
        handler = Handler(chunks_before)
        return await asyncio.wait_for(served(handler, behind, late), 30), handler.heard

    got, heard = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run())
    assert b"y" not in got
    assert heard == ["http.disconnect"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
