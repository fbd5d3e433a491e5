"""The transport of several ranks: a read is over when it is over on every rank."""

import asyncio
import ctypes
from collections.abc import Sequence

import msgspec
import pytest

from migration.errors import PeerLostError
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.local import LocalFabric, LocalTransport
from migration.transport.quarantine import Quarantine
from migration.transport.ranked import RankedTransport


class ScriptedRank:
    """A rank whose read goes on until the test ends it, also when it is cancelled: something still writes."""

    def __init__(self, heads: KvHeads | None = None) -> None:
        self.heads = heads
        self.quarantine = Quarantine()
        self.reads: list[tuple[str, bytes, list[int], list[int], KvHeads | None]] = []
        self.outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.writes_no_more = asyncio.Event()
        self.cancelled = 0
        self.forgotten: list[str] = []
        self.closed = False

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
        try:
            return await asyncio.shield(self.outcome)
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.writes_no_more.wait()
            raise

    def forget(self, peer: str) -> None:
        self.forgotten.append(peer)

    def close(self) -> None:
        self.closed = True


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def reading(*ranks: ScriptedRank) -> "asyncio.Task[int]":
    transport = RankedTransport(ranks)
    read = asyncio.create_task(transport.read("peer", transport.endpoint(), [1, 2], [3, 4]))
    await turns()
    return read


async def test_every_rank_copies_the_same_rows_from_the_peers_same_rank() -> None:
    fabric = LocalFabric()
    memories = {}
    ends = []
    for name in "ab":
        ranks = []
        for rank in range(2):
            memory = memories[name, rank] = bytearray(
                f"{name}{rank}".encode() * 8,
            )
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            transport = fabric.transport(f"{name}/{rank}")
            transport.register([KvRegion(address, 4, 4)])
            ranks.append(transport)
        ends.append(RankedTransport(ranks))
    a, b = ends

    copied = await b.read("a", a.endpoint(), [0, 3], [1, 2])

    assert copied == 2 * 2 * 4
    for rank in range(2):
        expected = f"b{rank}b{rank}a{rank}a{rank}a{rank}a{rank}b{rank}b{rank}"
        assert bytes(memories["b", rank]) == expected.encode()


async def test_a_read_waits_for_the_last_rank() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    read = await reading(*ranks)
    ranks[1].outcome.set_result(10)
    await turns()
    assert not read.done()

    ranks[0].outcome.set_result(20)

    assert await read == 30
    names = "peer", "peer, rank 1"
    assert [rank.reads for rank in ranks] == [[(name, b"endpoint", [1, 2], [3, 4], None)] for name in names]


@pytest.mark.parametrize("failed", [0, 1])
async def test_a_read_that_fails_on_one_rank_ends_when_the_other_writes_no_more(failed: int) -> None:
    ranks = ScriptedRank(), ScriptedRank()
    other = ranks[1 - failed]
    read = await reading(*ranks)
    ranks[failed].outcome.set_exception(PeerLostError("rank is gone"))
    await turns()
    assert other.cancelled == 1
    assert not read.done()

    other.writes_no_more.set()

    with pytest.raises(PeerLostError, match="rank is gone"):
        await read


async def test_a_rank_that_ends_well_while_the_read_has_failed_changes_nothing() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    read = await reading(*ranks)
    ranks[0].outcome.set_result(10)
    ranks[1].outcome.set_exception(ValueError("block out of range"))

    with pytest.raises(ValueError, match="block out of range"):
        await read


async def test_a_cancelled_read_waits_for_all_ranks_however_often_it_is_cancelled() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    read = await reading(*ranks)
    for _ in range(3):
        read.cancel()
        await turns()
    assert [rank.cancelled for rank in ranks] == [1, 1]

    ranks[0].writes_no_more.set()
    await turns()
    assert not read.done()
    ranks[1].writes_no_more.set()

    with pytest.raises(asyncio.CancelledError):
        await read


async def test_a_read_that_is_cancelled_while_it_fails_is_cancelled() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    read = await reading(*ranks)
    ranks[0].outcome.set_exception(PeerLostError("rank is gone"))
    await turns()
    read.cancel()
    await turns()
    assert not read.done()

    ranks[1].writes_no_more.set()

    with pytest.raises(asyncio.CancelledError):
        await read


async def test_blocks_are_in_quarantine_until_no_rank_writes_to_them() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    quarantine = RankedTransport(ranks).quarantine
    writing: list[asyncio.Future[None]] = []
    for rank, blocks in zip(ranks, ([1, 2], [2, 3]), strict=True):
        writing.append(asyncio.get_running_loop().create_future())
        rank.quarantine.add(blocks, writing[-1])
    assert [quarantine.holds([block]) for block in range(5)] == [False, True, True, True, False]
    assert quarantine.problems() == ["3 KV blocks wait until no failed read writes to them"]
    waiting = asyncio.create_task(quarantine.wait_for([2]))

    writing[0].set_result(None)
    await turns()
    assert not waiting.done()
    writing[1].set_result(None)

    await waiting
    assert quarantine.problems() == []


@pytest.mark.parametrize("number", [1, 3])
async def test_an_endpoint_of_another_number_of_ranks_is_refused(number: int) -> None:
    ranks = [ScriptedRank() for _ in range(2)]
    other = RankedTransport([ScriptedRank() for _ in range(number)])

    with pytest.raises(ValueError, match=f"the peer has {number} ranks instead of 2"):
        await RankedTransport(ranks).read("peer", other.endpoint(), [0], [0])

    assert not any(rank.reads for rank in ranks)


@pytest.mark.parametrize("endpoint", [b"", b"\x93", b"rubbish", b"\x91\x01"])
async def test_what_is_no_endpoint_of_ranks_is_refused(endpoint: bytes) -> None:
    with pytest.raises(ValueError, match="not the endpoint of ranks"):
        await RankedTransport([ScriptedRank()]).read("peer", endpoint, [0], [0])


async def test_all_ranks_forget_a_peer_and_are_closed() -> None:
    ranks = ScriptedRank(), ScriptedRank()
    transport = RankedTransport(ranks)

    transport.forget("peer")
    transport.close()

    assert [rank.forgotten for rank in ranks] == [["peer"], ["peer"]]
    assert all(rank.closed for rank in ranks)


class Sliced:
    """One rank with four heads, and a peer with two ranks, over a fabric that fails to order."""

    def __init__(self, **fabric: float) -> None:
        self.fabric = LocalFabric(**fabric)
        self.memory = bytearray(b".") * 16
        self.theirs = [bytearray(letters * 2) for letters in (b"AABB", b"CCDD")]
        self.here = RankedTransport([self._rank("here", self.memory, KvHeads(0, 4))])
        self.there = RankedTransport(
            [self._rank(f"there/{rank}", self.theirs[rank], KvHeads(2 * rank, 2)) for rank in range(2)]
        )

    def _rank(self, name: str, memory: bytearray, heads: KvHeads) -> LocalTransport:
        rank = self.fabric.transport(name)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        rank.register([KvRegion(address, 2, len(memory) // 2, heads=heads)])
        return rank

    async def read(self) -> int:
        return await self.here.read("there", self.there.endpoint(), [0], [1])


async def test_one_rank_reads_from_all_ranks_of_a_wider_peer() -> None:
    sliced = Sliced()

    assert await sliced.read() == 8

    assert bytes(sliced.memory) == b"." * 8 + b"AABBCCDD"


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_rank_of_the_peer_that_dies_during_a_read_ends_it_and_nothing_writes_any_more(
    lost: int,
) -> None:
    sliced = Sliced(latency_s=60)
    read = asyncio.create_task(sliced.read())
    await turns()

    sliced.fabric.fail(f"there/{lost}")

    with pytest.raises(PeerLostError, match="there, rank 1" if lost else "there"):
        await read
    sliced.fabric.latency_s = 0
    await turns()
    assert bytes(sliced.memory) == b"." * 16
    with pytest.raises(PeerLostError):
        await sliced.read()


async def test_blocks_of_a_failed_read_are_in_quarantine_for_every_rank_that_it_read_from() -> None:
    sliced = Sliced(latency_s=60)
    sliced.fabric.quarantine_s = 0.05
    read = asyncio.create_task(sliced.read())
    await turns()
    sliced.fabric.fail("there/1")
    with pytest.raises(PeerLostError):
        await read

    assert sliced.here.quarantine.holds([1])
    await sliced.here.quarantine.wait_for([1])


@pytest.mark.parametrize(
    ("heads", "why"),
    [
        ([KvHeads(0, 2)], "other KV heads"),
        ([KvHeads(0, 2), KvHeads(1, 2), KvHeads(2, 2)], "not in all regions"),
        ([KvHeads(0, 2), KvHeads(3, 1)], "no rank of the peer has KV head 2"),
        ([KvHeads(0, 2), None], "not divided by heads"),
        ([KvHeads(0, 4), KvHeads(0, 4)], "differ from the local ones"),
    ],
)
async def test_a_peer_that_lies_about_its_heads_is_not_read(heads: list[KvHeads | None], why: str) -> None:
    """What it says of its ranks, and of their regions, has to agree with each other and with ours."""
    sliced = Sliced()
    endpoints = [rank.endpoint() for rank in sliced.there._ranks] * 2
    lie = msgspec.msgpack.encode([(said, endpoints[rank]) for rank, said in enumerate(heads)])

    with pytest.raises(ValueError, match=why):
        await sliced.here.read("there", lie, [0], [1])


async def test_connections_to_all_ranks_of_a_peer_are_forgotten_and_no_others() -> None:
    here, there = ScriptedRank(KvHeads(0, 2)), [ScriptedRank(KvHeads(rank, 1)) for rank in range(2)]
    here.outcome.set_result(1)
    transport = RankedTransport([here])
    await transport.read("peer", RankedTransport(there).endpoint(), [0], [0])

    transport.forget("peer")
    transport.forget("unknown")

    assert here.forgotten == ["peer", "peer, rank 1", "unknown"]
