"""`NixlTransport` between real processes: contents, failures, and what is left behind.

Run as a program, this file is the other side: `python test_transport_nixl.py source NAME`.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from migration.transport import nixl_reader
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.nixl import NixlTransport
from migration.transport.ranked import RankedTransport
from pd_serve.errors import PeerLostError
from tests.environment import START_ENVIRONMENT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

REGIONS, BLOCKS, BLOCK_BYTES = 4, 512, 32 << 10  # 64 MiB an instance: 16 chunks
ALL = range(BLOCKS)

Memory = npt.NDArray[np.uint8]


def _memory(seed: int | None) -> tuple[Memory, list[KvRegion]]:
    """Memory whose content tells region, block and owner (seed); all 255 without a seed."""
    memory = np.full((REGIONS, BLOCKS, BLOCK_BYTES), 255, dtype=np.uint8)
    if seed is not None:
        memory[:] = _content(seed)[:, :, None]
    return memory, [KvRegion(part.ctypes.data, BLOCKS, BLOCK_BYTES) for part in memory]


def _content(seed: int) -> Memory:
    """The byte that fills each (region, block) of an owner."""
    region, block = np.ogrid[:REGIONS, :BLOCKS]
    return ((seed * 31 + region * 17 + block * 7) % 251).astype(np.uint8)


class Source:
    """A child process with a registered transport."""

    def __init__(self, name: str, seed: int, environment: dict[str, str] | None = None) -> None:
        self.name, self.seed = name, seed
        self.process = _run_this("source", name, str(seed), environment=environment)
        assert self.process.stdout is not None
        self.endpoint = bytes.fromhex(self.process.stdout.readline().strip())

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate(timeout=90)

    def stop(self) -> int:
        """Lets it close its transport and end; returns its exit code."""
        self.process.communicate(timeout=90)
        return self.process.returncode


def _run_this(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**START_ENVIRONMENT, "PYTHONPATH": root, **(environment or {})},
    )


def _shared_memory() -> set[str]:
    """Names of all shared memory there is, of any kind, but Python's own semaphores."""
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    files = [path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")]
    return {f"sysv {line.split()[1]} of {line.split()[4]}" for line in segments} | set(files)


def _of(pid: int) -> set[str]:
    number = re.compile(rf"(?<!\d){pid}(?!\d)")
    found = _shared_memory()
    segments = {name for name in found if name.startswith("sysv ")}
    files = {name for name in found - segments if number.search(name)}
    return files | {name for name in segments if name.endswith(f" of {pid}")}


MakeSource = Callable[..., Awaitable[Source]]


@pytest.fixture
def make_source() -> Iterator[MakeSource]:
    sources: list[Source] = []

    async def make(name: str, seed: int, environment: dict[str, str] | None = None) -> Source:
        source = await asyncio.to_thread(Source, name, seed, environment)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.kill()
        assert not _of(source.process.pid)


@pytest.fixture
def target() -> Iterator[tuple[NixlTransport, Memory]]:
    memory, regions = _memory(None)
    transport = NixlTransport("target", timeout_s=10)
    transport.register(regions)
    yield transport, memory
    transport.close()
    transport.close()
    assert not _of(os.getpid())


def _assert_read(memory: Memory, source: Source, remote: Sequence[int], local: Sequence[int]) -> None:
    expected = _content(source.seed)[:, remote]
    assert (memory[:, local] == expected[:, :, None]).all()


async def test_contents_concurrency_and_several_peers(
    make_source: MakeSource, target: tuple[NixlTransport, Memory]
) -> None:
    transport, memory = target
    one, two = await asyncio.gather(make_source("one", 1), make_source("two", 2))
    rng = random.Random(3)

    # Exactly the named blocks, in any order, with runs and without.
    remote, local = rng.sample(ALL, 40), rng.sample(ALL, 40)
    remote[10:20], local[10:20] = range(100, 110), range(200, 210)
    remote, local = remote[:20], list(dict.fromkeys(local))[:20]
    expected = memory.copy()
    expected[:, local] = _content(one.seed)[:, remote][:, :, None]
    assert await transport.read("one", one.endpoint, remote, local) == 20 * REGIONS * BLOCK_BYTES
    assert (memory == expected).all()
    assert await transport.read("one", one.endpoint, [], []) == 0

    # Many at once, from two peers, short and long ones, into blocks of their own.
    free = list(ALL)
    rng.shuffle(free)
    parts = [free[:100], *([block] for block in free[100:120]), free[120:400]]
    async with asyncio.TaskGroup() as group:
        for index, part in enumerate(parts):
            peer = (one, two)[index % 2]
            group.create_task(transport.read(peer.name, peer.endpoint, sorted(part), part))
    for index, part in enumerate(parts):
        _assert_read(memory, (one, two)[index % 2], sorted(part), part)

    # Idle, neither agent takes time.
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.05

    # Wrong use copies nothing.
    before = memory.copy()
    for bad in ([BLOCKS], [0]), ([0], [BLOCKS]), ([-1], [0]):
        with pytest.raises(ValueError, match="out of range"):
            await transport.read("one", one.endpoint, *bad)
    with pytest.raises(ValueError, match="endpoint"):
        await transport.read("one", b"\xc1", [0], [0])
    assert (memory == before).all()
    assert (one.stop(), two.stop()) == (0, 0)


async def test_cancelled_read_writes_nothing_more(
    make_source: MakeSource, target: tuple[NixlTransport, Memory]
) -> None:
    transport, memory = target
    source = await make_source("one", 1)
    await transport.read("one", source.endpoint, [0], [0])
    for delay_s in (0, 0.001, 0.003):
        reads = [asyncio.create_task(transport.read("one", source.endpoint, ALL, ALL)) for _ in range(8)]
        await asyncio.sleep(delay_s)
        cancelled = [read.cancel() for read in reads]
        assert any(cancelled)
        await asyncio.gather(*reads, return_exceptions=True)
        memory[:] = 255
        await asyncio.sleep(0.05)
        assert (memory == 255).all()
    await transport.read("one", source.endpoint, ALL, ALL)
    _assert_read(memory, source, ALL, ALL)


async def test_killed_peer_is_lost_and_others_are_not(
    make_source: MakeSource, target: tuple[NixlTransport, Memory]
) -> None:
    transport, memory = target
    victim, other = await asyncio.gather(make_source("victim", 1), make_source("other", 2))
    await transport.read("victim", victim.endpoint, ALL, ALL)

    async def read_on(peer: Source, half: range) -> None:
        while True:
            await transport.read(peer.name, peer.endpoint, half, half)

    lost = asyncio.create_task(read_on(victim, range(BLOCKS // 2)))
    kept = asyncio.create_task(read_on(other, range(BLOCKS // 2, BLOCKS)))
    await asyncio.sleep(0.1)
    victim.signal(signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(PeerLostError, match="victim"):
        await lost
    assert time.monotonic() - killed < 5
    left = memory[:, : BLOCKS // 2].copy()
    await asyncio.sleep(0.1)
    assert (memory[:, : BLOCKS // 2] == left).all()
    assert not kept.done()
    kept.cancel()
    with pytest.raises(asyncio.CancelledError):
        await kept

    # Dead it stays; others, and a successor of the same name, can be read.
    with pytest.raises(PeerLostError):
        await transport.read("victim", victim.endpoint, [0], [0])
    await asyncio.wait_for(transport.quarantine.wait_for(ALL), 30)
    assert transport.quarantine.problems() == []
    transport.forget("victim")
    transport.forget("nobody")
    successor = await make_source("victim", 3)
    for peer in (other, successor):
        await transport.read(peer.name, peer.endpoint, ALL, ALL)
        _assert_read(memory, peer, ALL, ALL)


async def test_silent_peer_is_lost_within_the_bound(make_source: MakeSource) -> None:
    memory, regions = _memory(None)
    transport = NixlTransport("target", timeout_s=1.0)
    transport.register(regions)
    silent, other = await asyncio.gather(make_source("silent", 1), make_source("other", 2))
    silent.signal(signal.SIGSTOP)
    await transport.read("other", other.endpoint, ALL, ALL)
    began = time.monotonic()
    lost = asyncio.create_task(transport.read("silent", silent.endpoint, [5], [5]))
    while not lost.done():  # meanwhile the other can be read
        await transport.read("other", other.endpoint, range(10, 20), range(10, 20))
    with pytest.raises(PeerLostError, match="too long"):
        await lost
    assert 0.9 < time.monotonic() - began < 3
    assert transport.quarantine.holds([5])
    memory[:] = 255
    silent.signal(signal.SIGCONT)
    await asyncio.wait_for(transport.quarantine.wait_for([5]), 30)
    await asyncio.sleep(0.2)
    assert (memory == 255).all()
    await transport.read("silent", silent.endpoint, ALL, ALL)  # it is well again
    _assert_read(memory, silent, ALL, ALL)

    # Given up from outside, or closed, a read ends at once.
    for end in (lambda: transport.forget("third"), transport.close):
        third = await make_source("third", 3)
        third.signal(signal.SIGSTOP)
        task = asyncio.create_task(transport.read("third", third.endpoint, [0], [0]))
        await asyncio.sleep(0.1)
        end()
        with pytest.raises(PeerLostError):
            await asyncio.wait_for(task, 0.5)
    with pytest.raises(PeerLostError, match="closed"):
        await transport.read("other", other.endpoint, [0], [0])


async def test_connections_of_strangers_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """At all listening ports, also of the agent that reads and has nothing to read."""
    monkeypatch.setattr(nixl_reader, "IDLE_PROGRESS_S", 0.05)
    process = psutil.Process()

    def listening() -> set[tuple[str, int]]:
        found = process.net_connections("tcp")
        return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}

    before = listening()
    transport = NixlTransport("target")
    transport.register(_memory(None)[1])
    ports = listening() - before
    descriptors = process.num_fds()
    try:
        assert len(ports) >= 2
        for said in (b"", b"\x01", os.urandom(64)):
            for port in ports:
                for _ in range(100):
                    with socket.create_connection(port) as stranger:
                        stranger.sendall(said)
        async with asyncio.timeout(30):
            while process.num_fds() > descriptors + 8:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        transport.close()


async def test_a_reader_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has to end: nobody knows what it still writes to."""
    monkeypatch.setattr("migration.transport.read_caller.LOOK_S", 0.01)
    monkeypatch.setattr("migration.transport.read_caller.OVERDUE_S", 0.02)
    failures: list[BaseException] = []
    _, regions = _memory(None)
    transport = NixlTransport("target", timeout_s=0.05, on_failure=failures.append)
    transport.register(regions)
    monkeypatch.setattr("migration.transport.nixl_reader.NixlReader.submit", lambda reader, job: None)
    with pytest.raises(PeerLostError, match="does not answer"):
        await transport.read("one", transport.endpoint(), [0], [1])
    assert len(failures) == 1
    assert transport.quarantine.holds([1])
    transport.close()


async def test_one_rank_reads_its_heads_from_two_processes_until_one_of_them_dies(
    make_source: MakeSource,
) -> None:
    """Each half of a block comes from a process of its own, as where two workers hand off to one."""
    memory, regions = _memory(None)
    rank = NixlTransport("target", timeout_s=10)
    rank.register([replace(region, heads=KvHeads(0, 2)) for region in regions])
    transport = RankedTransport([rank])
    sources = await asyncio.gather(*(make_source(f"rank {i}", 1 + i, {"HEAD": str(i)}) for i in range(2)))
    endpoint = msgspec.msgpack.encode([(KvHeads(i, 1), source.endpoint) for i, source in enumerate(sources)])
    halves = memory.reshape(REGIONS, BLOCKS, 2, BLOCK_BYTES // 2)
    remote, local = list(range(40, 60)), list(range(100, 60, -2))
    try:
        copied = await transport.read("peer", endpoint, remote, local)

        assert copied == 20 * REGIONS * BLOCK_BYTES
        for head, source in enumerate(sources):
            assert (halves[:, local, head] == _content(source.seed)[:, remote][:, :, None]).all()
        assert (memory[:, 101] == 255).all()

        async def read_on() -> None:
            while True:
                await transport.read("peer", endpoint, ALL, ALL)

        reading = asyncio.create_task(read_on())
        await asyncio.sleep(0.1)
        sources[1].signal(signal.SIGKILL)
        with pytest.raises(PeerLostError, match="peer, rank 1"):
            await asyncio.wait_for(reading, 20)
        await asyncio.wait_for(transport.quarantine.wait_for(ALL), 30)
        left = memory.copy()
        await asyncio.sleep(0.1)
        assert (memory == left).all()
    finally:
        transport.close()


@pytest.mark.parametrize("transports", ["^cma", "tcp"])
async def test_works_without_direct_access_to_the_peers_memory(
    make_source: MakeSource, transports: str
) -> None:
    """As where process_vm_readv is forbidden, and as between machines; the source's Python is busy."""
    environment = {"UCX_TLS": transports, "BUSY": "1"}
    source = await make_source("one", 1, environment)
    reader = await asyncio.to_thread(_run_this, "reader", source.endpoint.hex(), environment=environment)
    output, _ = await asyncio.to_thread(reader.communicate, timeout=120)
    assert (output.strip(), reader.returncode) == ("exact", 0)


def _source(name: str, seed: str) -> None:
    _, regions = _memory(int(seed))
    if "HEAD" in os.environ:  # one of two heads: blocks of half the size
        memory = np.repeat(_content(int(seed))[:, :, None], BLOCK_BYTES // 2, axis=2)
        head = KvHeads(int(os.environ["HEAD"]), 1)
        regions = [KvRegion(part.ctypes.data, BLOCKS, BLOCK_BYTES // 2, heads=head) for part in memory]
    transport = NixlTransport(name)
    transport.register(regions)
    print(transport.endpoint().hex(), flush=True)
    if os.environ.get("BUSY"):
        while True:
            sum(range(1000))
    sys.stdin.read()
    transport.close()


def _reader(endpoint: str) -> None:
    async def read() -> None:
        memory, regions = _memory(None)
        transport = NixlTransport("reader")
        transport.register(regions)
        mixed = random.Random(1).sample(ALL, BLOCKS)
        await transport.read("one", bytes.fromhex(endpoint), mixed, ALL)
        exact = bool((memory == _content(1)[:, mixed][:, :, None]).all())
        transport.close()
        print("exact" if exact else "wrong")

    asyncio.run(read())


if __name__ == "__main__":
    {"source": _source, "reader": _reader}[sys.argv[1]](*sys.argv[2:])
