"""A worker's transport and its instance, over a socket pair: the worker's side runs in its own thread."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from migration.errors import PeerLostError
from migration.transport.kv_transport import KvHeads
from migration.transport.quarantine import Quarantine
from migration.transport.worker_server import WorkerServer
from migration.transport.worker_transport import WorkerMemory, WorkerTransport


class ScriptedTransport:
    """The transport in the worker: each read does what the script says."""

    def __init__(self, script: "Callable[[ScriptedTransport, Sequence[int]], object]") -> None:
        self.quarantine = Quarantine()
        self.heads = None
        self.reads: list[tuple[str, bytes, list[int], list[int], KvHeads | None]] = []
        self.script = script
        self.began, self.cancelled = threading.Event(), threading.Event()
        self.may_end = threading.Event()
        self.forgotten: list[str] = []
        self.closed = threading.Event()

    def endpoint(self) -> bytes:
        return b"endpoint"

    async def read(
        self,
        peer: str,
        endpoint: bytes,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        heads: KvHeads | None = None,
    ) -> int:
        self.reads.append((peer, endpoint, list(remote_blocks), list(local_blocks), heads))
        self.began.set()
        result = self.script(self, local_blocks)
        if result is not None:
            assert isinstance(result, int)
            return result
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            while not self.may_end.is_set():  # noqa: ASYNC110 - set by the test's thread
                await asyncio.sleep(0.001)
        raise AssertionError

    def forget(self, peer: str) -> None:
        self.forgotten.append(peer)

    def close(self) -> None:
        self.closed.set()


@dataclass
class Link:
    """Both ends, the worker's end of the connection, and the server behind it."""

    transport: WorkerTransport
    worker: ScriptedTransport
    connection: socket.socket
    server: WorkerServer
    failures: list[BaseException] = field(default_factory=list)

    async def server_ends(self) -> None:
        if self.server._thread.ident is not None:
            await asyncio.to_thread(self.server._thread.join, 10)

    async def read(self) -> int:
        return await self.transport.read("peer", b"theirs", [1, 2], [3, 4], KvHeads(1, 2))


MakeLink = Callable[..., "asyncio.Future[Link]"]


@pytest.fixture
async def make_link() -> AsyncIterator[Callable[..., object]]:
    links: list[Link] = []

    async def make(
        script: Callable[[ScriptedTransport, Sequence[int]], object] = lambda transport, blocks: 64,
        *,
        serves: bool = True,
        timeout_s: float = 30.0,
    ) -> Link:
        ours, theirs = socket.socketpair()
        worker = ScriptedTransport(script)
        server = WorkerServer(worker, theirs)
        if serves:
            server.start()
        failures: list[BaseException] = []
        transport = WorkerTransport(
            "decode-0", WorkerMemory(1, b"mine", ours), timeout_s=timeout_s, on_failure=failures.append
        )
        await transport.open()
        links.append(Link(transport, worker, theirs, server, failures))
        return links[-1]

    yield make
    for link in links:
        link.worker.may_end.set()
        link.transport.close()
        await asyncio.sleep(0)  # asyncio closes sockets in the next turn of the loop
        await link.server_ends()
        link.connection.close()


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


def raising(error: Exception) -> Callable[[ScriptedTransport, Sequence[int]], object]:
    def script(transport: ScriptedTransport, blocks: Sequence[int]) -> object:
        raise error

    return script


def endless(transport: ScriptedTransport, blocks: Sequence[int]) -> object:
    return None


async def test_a_read_is_carried_out_in_the_worker(make_link: MakeLink) -> None:
    link = await make_link()

    assert await asyncio.gather(link.read(), link.read()) == [64, 64]

    assert link.worker.reads == [("peer", b"theirs", [1, 2], [3, 4], KvHeads(1, 2))] * 2
    assert link.transport.endpoint() == b"mine"
    assert not link.failures


@pytest.mark.parametrize(
    ("error", "kind"),
    [(PeerLostError("the peer is gone"), PeerLostError), (ValueError("the peer is gone"), ValueError)],
)
async def test_errors_of_the_worker_are_those_of_the_read(
    make_link: MakeLink, error: Exception, kind: type[Exception]
) -> None:
    link = await make_link(raising(error))

    with pytest.raises(kind, match="the peer is gone"):
        await link.read()

    assert not link.transport.quarantine.holds([3, 4])
    assert not link.failures


async def test_a_cancelled_read_is_cancelled_in_the_worker_and_waits_for_its_end(make_link: MakeLink) -> None:
    link = await make_link(endless)
    read = asyncio.create_task(link.read())
    await until(link.worker.began)
    for _ in range(3):
        read.cancel()
        await until(link.worker.cancelled)
    assert not read.done()

    link.worker.may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await read
    assert not link.transport.quarantine.holds([3, 4])


async def test_blocks_are_in_quarantine_here_until_the_worker_writes_to_them_no_more(
    make_link: MakeLink,
) -> None:
    quiet: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def script(transport: ScriptedTransport, blocks: Sequence[int]) -> object:
        loop = asyncio.get_running_loop()
        quiet.append((loop, loop.create_future()))
        transport.quarantine.add(blocks, quiet[0][1])
        raise PeerLostError("took too long to answer")

    link = await make_link(script)
    with pytest.raises(PeerLostError, match="took too long"):
        await link.read()
    assert link.transport.quarantine.holds([4])
    assert link.transport.quarantine.problems()

    loop, future = quiet[0]
    loop.call_soon_threadsafe(future.set_result, None)

    async with asyncio.timeout(10):
        await link.transport.quarantine.wait_for([3, 4])


async def test_a_worker_that_ends_fails_the_instance_and_its_blocks_are_not_used(make_link: MakeLink) -> None:
    """What it still writes to is not known: the instance's process has to end."""
    link = await make_link(serves=False)
    read = asyncio.create_task(link.read())
    await asyncio.sleep(0.01)

    link.connection.close()

    with pytest.raises(PeerLostError, match="worker 1 of decode-0 has ended"):
        await read
    await asyncio.sleep(0.01)
    assert [str(error) for error in link.failures] == ["worker 1 of decode-0 has ended"]
    assert link.transport.quarantine.holds([3])
    with pytest.raises(PeerLostError, match="closed"):
        await link.read()


async def test_a_worker_that_does_not_answer_fails_the_instance(
    make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migration.transport.read_caller.LOOK_S", 0.01)
    monkeypatch.setattr("migration.transport.read_caller.OVERDUE_S", 0.02)
    link = await make_link(serves=False, timeout_s=0.05)

    with pytest.raises(PeerLostError, match="worker 1 of decode-0 does not answer"):
        await link.read()

    assert len(link.failures) == 1
    assert link.transport.quarantine.holds([3])


async def test_what_is_no_message_of_a_worker_fails_the_instance(make_link: MakeLink) -> None:
    link = await make_link(serves=False)
    read = asyncio.create_task(link.read())

    link.connection.sendall(b"\0\0\0\2\xc1\xc1")

    with pytest.raises(PeerLostError):
        await read
    assert len(link.failures) == 1


async def test_a_closed_transport_closes_the_workers_and_is_no_failure(make_link: MakeLink) -> None:
    link = await make_link(endless)
    read = asyncio.create_task(link.read())
    await until(link.worker.began)
    link.worker.may_end.set()

    link.transport.close()
    link.transport.close()

    with pytest.raises(PeerLostError, match="closed"):
        await read
    await link.server_ends()
    assert link.worker.closed.is_set()
    assert not link.failures
    with pytest.raises(PeerLostError, match="closed"):
        await link.read()


async def test_a_peer_is_forgotten_in_the_worker(make_link: MakeLink) -> None:
    link = await make_link()

    link.transport.forget("peer")

    await link.read()  # comes after it
    assert link.worker.forgotten == ["peer"]
