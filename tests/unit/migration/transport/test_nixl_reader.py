"""The reader's thread over an agent that fails to order: chunks, lost connections, quarantine, resets."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from migration.transport import nixl_connections, nixl_reader, read_job
from migration.transport.head_slices import KvRows, rows_of
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.nixl_agent import Indices, NixlFailure
from migration.transport.nixl_connections import ReadPath
from migration.transport.nixl_reader import NixlReader
from migration.transport.read_job import ReadJob
from pd_serve.errors import PeerLostError

BLOCKS = 100
HOST, DEVICE = KvRegion(0x1000, BLOCKS, 1024), KvRegion(0x900000, BLOCKS, 1024, device_id=0)


class FakeNixl:
    """What all fake agents share: the behaviour of peers, and a record of what happened.

    Attributes:
        stalled: Peers whose reads never end.
        broken: Peers whose reads fail when polled.
        unreachable: Peers that cannot be connected.
        undying: Peers from which the agent cannot disconnect.
        slow: Whether reads end when polled and not when posted.
        log: ("open"|"close"|"disconnect"|"read", agent or peer, remote indices).
    """

    def __init__(self) -> None:
        self.stalled: set[str] = set()
        self.broken: set[str] = set()
        self.unreachable: set[str] = set()
        self.undying: set[str] = set()
        self.no_agents = False
        self.crash: BaseException | None = None
        self.hang = threading.Event()
        self.hang.set()
        self.slow = True
        self.log: list[tuple[str, str, list[int]]] = []
        self.open_agents: list[FakeAgent] = []
        self.changed = threading.Condition()

    def agent(self, name: str, regions: Sequence[KvRegion], *, progress_thread: bool) -> "FakeAgent":
        assert not progress_thread
        if self.no_agents:
            raise NixlFailure("no more agents")
        agent = FakeAgent(self, name)
        self.open_agents.append(agent)
        self.note("open", name)
        return agent

    def note(self, what: str, who: str, indices: Sequence[int] = ()) -> None:
        with self.changed:
            self.log.append((what, who, list(indices)))
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=5)

    def reads_of(self, peer: str) -> list[list[int]]:
        return [indices for what, who, indices in self.log if (what, who) == ("read", peer)]


class FakeAgent:
    """`NixlAgent` without NIXL. A peer's metadata is its name, with an optional ".incarnation"."""

    def __init__(self, nixl: FakeNixl, name: str) -> None:
        self.nixl, self.name = nixl, name
        self.handles: dict[int, str] = {}
        self.lists: dict[int, str | None] = {}
        self.count = 0
        self.closed = False

    def _new(self) -> int:
        assert not self.closed
        self.count += 1
        return self.count

    def enter_thread(self) -> None:
        assert threading.current_thread().name.startswith("nixl-reader")

    def connect(self, metadata: bytes) -> str:
        assert not self.closed
        if metadata.decode() in self.nixl.unreachable:
            raise NixlFailure("refused")
        return metadata.decode()

    def disconnect(self, agent_name: str) -> None:
        assert not self.closed
        assert agent_name not in self.lists.values()
        assert agent_name not in self.handles.values(), "reads of it must have been released"
        if agent_name in self.nixl.undying:
            raise NixlFailure("still in use")
        self.nixl.note("disconnect", agent_name)

    def progress(self) -> None:
        assert not self.closed
        self.nixl.note("progress", self.name)

    def prepare(self, agent_name: str | None, rows: Sequence[KvRows]) -> int:
        handle = self._new()
        self.lists[handle] = agent_name
        return handle

    def discard(self, prepared: int) -> None:
        del self.lists[prepared]

    def read(self, local: int, local_indices: Indices, remote: int, remote_indices: Indices) -> int | None:
        assert self.lists[local] is None
        assert len(local_indices) == len(remote_indices)
        peer = self.lists[remote]
        assert peer is not None
        self.nixl.note("read", peer, remote_indices.tolist())
        if not self.nixl.slow and peer not in self.nixl.stalled | self.nixl.broken:
            return None
        handle = self._new()
        self.handles[handle] = peer
        return handle

    def is_done(self, handle: int) -> bool:
        assert not self.closed
        self.nixl.hang.wait()
        if self.nixl.crash is not None:
            raise self.nixl.crash
        peer = self.handles[handle]
        if peer in self.nixl.broken:
            raise NixlFailure("disconnected")
        return peer not in self.nixl.stalled

    def release(self, handle: int) -> None:
        del self.handles[handle]

    def close(self) -> None:
        assert not self.handles
        self.closed = True
        self.nixl.open_agents.remove(self)
        self.nixl.note("close", self.name)


@pytest.fixture
def nixl(monkeypatch: pytest.MonkeyPatch) -> FakeNixl:
    fake = FakeNixl()
    monkeypatch.setattr(nixl_connections, "NixlAgent", fake.agent)
    for name in ("MIN_CHUNK_BYTES", "MAX_CHUNK_BYTES"):
        monkeypatch.setattr(read_job, name, 10 * 1024)  # ten blocks of one region
    monkeypatch.setattr(nixl_reader, "QUARANTINE_S", 0.05)
    return fake


@pytest.fixture
def reader(nixl: FakeNixl) -> Iterator[NixlReader]:
    threads = threading.active_count()
    reader = NixlReader("me", [HOST])
    yield reader
    reader.close()
    reader.close()
    assert threading.active_count() == threads
    assert not nixl.open_agents


def _job(
    peer: str,
    blocks: Sequence[int] = (1,),
    *,
    metadata: str | None = None,
    within_s: float = 5.0,
    regions: Sequence[KvRegion] = (HOST,),
    local: tuple[KvRows, ...] | None = None,
) -> ReadJob:
    loop = asyncio.get_running_loop()
    return ReadJob(
        peer=peer,
        path=ReadPath((metadata or peer).encode(), tuple(rows_of(regions, None)), local),
        block_bytes=sum(region.block_bytes for region in regions),
        remote_blocks=np.array(blocks, dtype=np.int32),
        local_blocks=np.array(blocks, dtype=np.int32),
        deadline=time.monotonic() + within_s,
        loop=loop,
        done=loop.create_future(),
        quiet=loop.create_future(),
    )


def _start(reader: NixlReader, *jobs: ReadJob) -> None:
    for job in jobs:
        reader.submit(job)


@pytest.mark.parametrize("slow", [True, False])
async def test_long_reads_go_in_chunks_and_short_ones_overtake(
    nixl: FakeNixl, reader: NixlReader, slow: bool
) -> None:
    nixl.slow = slow
    nixl.stalled = {"gate"}
    gate = _job("gate")
    _start(reader, gate)
    nixl.wait_for(lambda: bool(nixl.reads_of("gate")))
    long, short = _job("a", range(95)), _job("b", [7])
    with reader._wake:  # both arrive at once
        reader._inbox += [long, short]
        reader._wake.notify()
    await asyncio.wait_for(asyncio.gather(long.done, short.done), 5)
    assert nixl.reads_of("a") == [list(range(i, min(i + 10, 95))) for i in range(0, 95, 10)]
    order = [who for what, who, _ in nixl.log if what == "read"]
    assert order.index("b") <= 3
    reader.forget("gate")
    with pytest.raises(PeerLostError, match="given up"):
        await gate.done


async def test_block_lists_are_made_once_a_peer(nixl: FakeNixl, reader: NixlReader) -> None:
    for _ in range(3):
        job = _job("a")
        _start(reader, job)
        await job.done
    assert list(nixl.open_agents[0].lists.values()) == [None, "a"]


async def test_host_and_device_regions_go_separately(nixl: FakeNixl) -> None:
    regions = [HOST, DEVICE, HOST]
    reader = NixlReader("me", regions)
    job = _job("a", [1, 2], regions=regions)
    _start(reader, job)
    await job.done
    # Two host regions one after the other in the index, and the device's own.
    assert nixl.reads_of("a") == [[1, 2, BLOCKS + 1, BLOCKS + 2], [1, 2]]
    reader.close()


async def test_a_read_that_fails_costs_its_connection_and_not_the_agent(
    nixl: FakeNixl, reader: NixlReader
) -> None:
    nixl.broken = {"bad"}
    nixl.stalled = {"good"}  # under way when the other breaks
    good = _job("good", range(30))
    _start(reader, good)
    nixl.wait_for(lambda: len(nixl.reads_of("good")) == 2)
    bad = _job("bad")
    _start(reader, bad)
    with pytest.raises(PeerLostError, match="bad: disconnected"):
        await bad.done
    assert not bad.quiet.done()
    nixl.stalled = set()
    await good.done
    assert good.quiet.done()
    chunks = [list(range(i, i + 10)) for i in (0, 10, 20)]
    assert nixl.reads_of("good") == chunks, "each was read once"
    await bad.quiet
    opened = [who for what, who, _ in nixl.log if what in ("open", "close")]
    assert opened == ["me/read-0"], "one agent, which lives on with its registered memory"
    assert ("disconnect", "bad", []) in nixl.log


async def test_blocks_of_a_lost_read_are_quiet_after_the_connection_has_been_driven_to_its_end(
    nixl: FakeNixl, reader: NixlReader
) -> None:
    nixl.stalled = {"a"}
    job = _job("a", within_s=0.05)
    _start(reader, job)
    with pytest.raises(PeerLostError, match="too long"):
        await job.done
    assert not job.quiet.done()
    await job.quiet
    after = [what for what, _, _ in nixl.log]
    assert "progress" in after[after.index("disconnect") :]
    assert "close" not in after


async def test_all_reads_over_a_lost_connection_end(nixl: FakeNixl, reader: NixlReader) -> None:
    """One that went on would be read again over the next connection, while the last one still writes."""
    nixl.stalled = {"a"}
    overdue, other = _job("a", within_s=0.05), _job("a", range(30))
    _start(reader, overdue, other)
    for job in (overdue, other):
        with pytest.raises(PeerLostError, match="too long"):
            await job.done
    nixl.stalled = set()
    again = _job("a")
    _start(reader, again)
    await again.done
    assert again.quiet.done()


async def test_a_connection_that_cannot_be_closed_costs_a_reset(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.broken = nixl.undying = {"bad"}
    nixl.stalled = {"good"}
    good = _job("good", range(30))
    _start(reader, good)
    nixl.wait_for(lambda: len(nixl.reads_of("good")) == 2)
    bad = _job("bad")
    _start(reader, bad)
    with pytest.raises(PeerLostError, match="bad: disconnected"):
        await bad.done
    await bad.quiet
    assert ("close", "me/read-0", []) in nixl.log
    nixl.stalled = set()
    await good.done
    # Its chunks under way went again, in order, through the next agent.
    chunks = [list(range(i, i + 10)) for i in (0, 10, 20)]
    assert nixl.reads_of("good") == [chunks[0], chunks[1], *chunks]
    assert [who for what, who, _ in nixl.log if what == "open"] == ["me/read-0", "me/read-1"]


async def test_unreachable_peer_disturbs_nobody(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.unreachable = {"a"}
    job = _job("a")
    _start(reader, job)
    with pytest.raises(PeerLostError, match="refused"):
        await job.done
    assert not [entry for entry in nixl.log if entry[0] == "close"]


async def test_cancelled_read_posts_no_further_chunk(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.stalled = {"a"}
    job = _job("a", range(50))
    _start(reader, job)
    nixl.wait_for(lambda: len(nixl.reads_of("a")) == 2)
    job.cancelled.set()
    await asyncio.sleep(0.02)
    assert not job.done.done()
    nixl.stalled = set()
    await job.done
    assert len(nixl.reads_of("a")) == 2
    assert not [entry for entry in nixl.log if entry[0] == "close"]


async def test_a_cancelled_read_that_does_not_end_goes_on_without_its_caller(
    nixl: FakeNixl, reader: NixlReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "CANCEL_GRACE_S", 0.02)
    nixl.stalled = {"a"}
    job, other = _job("a"), _job("a")
    _start(reader, job, other)
    nixl.wait_for(lambda: len(nixl.reads_of("a")) == 2)
    job.cancelled.set()
    with pytest.raises(PeerLostError):
        await asyncio.wait_for(job.done, 1)
    assert not job.quiet.done()
    nixl.stalled = set()
    await job.quiet
    await other.done
    assert not [what for what, _, _ in nixl.log if what in ("close", "disconnect")]


async def test_a_cancelled_read_that_never_ends_is_bound_by_its_deadline(
    nixl: FakeNixl, reader: NixlReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "CANCEL_GRACE_S", 0.02)
    nixl.stalled = {"a"}
    job = _job("a", within_s=0.1)
    _start(reader, job)
    nixl.wait_for(lambda: bool(nixl.reads_of("a")))
    job.cancelled.set()
    with pytest.raises(PeerLostError):
        await job.done
    await asyncio.wait_for(job.quiet, 5)
    assert ("disconnect", "a", []) in nixl.log


async def test_a_reader_that_ends_unforeseen_says_so(nixl: FakeNixl) -> None:
    failures: list[BaseException] = []
    reader = NixlReader("me", [HOST], failures.append)
    nixl.stalled = {"a"}
    nixl.crash = AssertionError("unforeseen")
    job = _job("a")
    _start(reader, job)
    with pytest.raises(PeerLostError, match="closed"):
        await job.done
    assert failures == [nixl.crash]
    with pytest.raises(PeerLostError, match="closed"):
        reader.submit(_job("a"))
    reader.close()


async def test_close_does_not_wait_for_a_call_that_hangs(
    nixl: FakeNixl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "CLOSE_S", 0.05)
    reader = NixlReader("me", [HOST])
    nixl.stalled = {"a"}
    nixl.hang.clear()
    job = _job("a")
    _start(reader, job)
    nixl.wait_for(lambda: bool(nixl.reads_of("a")))
    await asyncio.to_thread(reader.close)
    assert not job.done.done()
    nixl.hang.set()
    with pytest.raises(PeerLostError, match="closed"):
        await job.done
    reader.close()


async def test_peer_started_anew_replaces_the_old_one(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.stalled = {"a.1"}
    old = _job("a", metadata="a.1")
    _start(reader, old)
    nixl.wait_for(lambda: bool(nixl.reads_of("a.1")))
    new = _job("a", metadata="a.2")
    _start(reader, new)
    with pytest.raises(PeerLostError, match="anew"):
        await old.done
    await new.done
    again = _job("a", metadata="a.3")
    _start(reader, again)
    await again.done
    assert ("disconnect", "a.2", []) in nixl.log


async def test_forget_drops_an_idle_connection(nixl: FakeNixl, reader: NixlReader) -> None:
    job = _job("a")
    _start(reader, job)
    await job.done
    reader.forget("a")
    reader.forget("nobody")
    nixl.wait_for(lambda: ("disconnect", "a", []) in nixl.log)


async def test_an_idle_agent_is_driven(nixl: FakeNixl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_reader, "IDLE_PROGRESS_S", 0.01)
    reader = NixlReader("me", [HOST])
    driven = ("progress", "me/read-0", [])

    await asyncio.to_thread(nixl.wait_for, lambda: nixl.log.count(driven) > 2 * nixl_reader.IDLE_TURNS)
    job = _job("a")
    _start(reader, job)
    await job.done

    reader.close()
    assert nixl.reads_of("a") == [[1]]


async def test_close_ends_what_is_under_way_and_what_waits(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.stalled = {"a"}
    job = _job("a")
    _start(reader, job)
    nixl.wait_for(lambda: bool(nixl.reads_of("a")))
    await asyncio.to_thread(reader.close)
    with pytest.raises(PeerLostError, match="closed"):
        await job.done
    with pytest.raises(PeerLostError, match="closed"):
        reader.submit(_job("a"))
    reader.forget("a")


async def test_reads_fail_while_no_agent_can_be_made(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.broken = nixl.undying = {"a"}
    nixl.no_agents = True
    for _ in range(2):
        job = _job("a")
        _start(reader, job)
        with pytest.raises(PeerLostError):
            await job.done
    nixl.no_agents = False
    nixl.broken = set()
    job = _job("a")
    _start(reader, job)
    await job.done


async def test_lists_of_slices_end_with_their_connection(nixl: FakeNixl, reader: NixlReader) -> None:
    """Those of whole blocks are everybody's."""
    nixl.slow = False
    (agent,) = nixl.open_agents
    whole = len(agent.lists)
    (slices,) = rows_of([replace(HOST, heads=KvHeads(0, 2))], KvHeads(1, 1))
    one, other = _job("one", local=(slices,)), _job("other")
    _start(reader, one, other)
    await one.done
    await other.done
    assert len(agent.lists) == whole + 3

    for name in ("one", "other"):
        reader.forget(name)

    await asyncio.to_thread(nixl.wait_for, lambda: len(agent.lists) == whole)


async def test_a_peer_whose_slices_change_is_connected_anew(nixl: FakeNixl, reader: NixlReader) -> None:
    nixl.slow = False
    heads = replace(HOST, heads=KvHeads(0, 2))
    jobs = [_job("peer", local=tuple(rows_of([heads], KvHeads(head, 1)))) for head in (0, 1)]
    for job in jobs:
        _start(reader, job)
        await job.done
    assert ("disconnect", "peer", []) in nixl.log
    assert len(nixl.reads_of("peer")) == 2
