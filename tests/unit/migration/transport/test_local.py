"""`LocalTransport` against the contract of `KvTransport`, and the fabric's failures."""

import asyncio
import random
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from migration.transport import local
from migration.transport.kv_transport import KvRegion, KvTransport
from migration.transport.local import LocalFabric, LocalTransport
from pd_serve.errors import PeerLostError

BLOCKS, BLOCK_BYTES = 16, 64

Memory = npt.NDArray[np.uint8]


_alive: list[Memory] = []


@pytest.fixture(autouse=True)
def _memory_outlives_the_test() -> Iterator[None]:
    """As the contract asks: the caller of `register` keeps the memory alive."""
    yield
    _alive.clear()


def _instance(fabric: LocalFabric, name: str, fill: int | None = None) -> tuple[LocalTransport, Memory]:
    """A registered transport over two regions; random content unless `fill` is given."""
    shape = (2, BLOCKS, BLOCK_BYTES)
    rng = np.random.default_rng(len(name))
    memory = (
        rng.integers(0, 255, shape, dtype=np.uint8) if fill is None else np.full(shape, fill, dtype=np.uint8)
    )
    _alive.append(memory)
    transport = fabric.transport(name)
    transport.register([KvRegion(half.ctypes.data, BLOCKS, BLOCK_BYTES) for half in memory])
    return transport, memory


def test_satisfies_the_protocol() -> None:
    transport: KvTransport = LocalFabric().transport("a")
    assert transport.endpoint()


async def test_copies_exactly_the_named_blocks() -> None:
    fabric = LocalFabric()
    source, theirs = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    rng = random.Random(5)
    remote, mine = rng.sample(range(BLOCKS), 7), rng.sample(range(BLOCKS), 7)
    expected = ours.copy()
    expected[:, mine] = theirs[:, remote]
    assert await target.read("source", source.endpoint(), remote, mine) == 7 * 2 * BLOCK_BYTES
    assert (ours == expected).all()


async def test_reads_run_at_once_and_take_latency_and_speed() -> None:
    fabric = LocalFabric(latency_s=0.02, bytes_per_s=2 * BLOCK_BYTES / 0.03)
    source, theirs = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for block in range(10):
            group.create_task(target.read("source", source.endpoint(), [block], [block + 1]))
    took_s = time.monotonic() - began
    assert (ours[:, 1:11] == theirs[:, :10]).all()
    assert 0.045 < took_s < 0.2


async def test_long_reads_let_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CHUNK_BYTES", BLOCK_BYTES)
    fabric = LocalFabric()
    source, _ = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    task = asyncio.create_task(target.read("source", source.endpoint(), range(BLOCKS), range(BLOCKS)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert ours[:, 0].any()
    assert not ours[:, -1].any()
    await task


async def test_failed_peer_ends_reads_under_way_and_later_ones() -> None:
    fabric = LocalFabric(latency_s=60)
    source, _ = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    task = asyncio.create_task(target.read("source", source.endpoint(), [1], [1]))
    await asyncio.sleep(0.01)
    fabric.fail("source")
    with pytest.raises(PeerLostError, match="source"):
        await task
    with pytest.raises(PeerLostError):
        await target.read("source", source.endpoint(), [1], [1])
    assert not ours.any()
    fabric.latency_s = 0
    fabric.restore("source")
    await target.read("source", source.endpoint(), [1], [1])


async def test_failed_reader_cannot_read_either() -> None:
    fabric = LocalFabric()
    source, _ = _instance(fabric, "source")
    target, _ = _instance(fabric, "target")
    fabric.fail("target")
    with pytest.raises(PeerLostError):
        await target.read("source", source.endpoint(), [1], [1])


async def test_stalled_peer_goes_on_after_restore() -> None:
    fabric = LocalFabric()
    source, theirs = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    fabric.stall("source")
    task = asyncio.create_task(target.read("source", source.endpoint(), [2], [3]))
    await asyncio.sleep(0.02)
    assert not task.done()
    fabric.restore("source")
    await task
    assert (ours[:, 3] == theirs[:, 2]).all()


async def test_stall_beyond_the_bound_is_a_lost_peer() -> None:
    fabric = LocalFabric(timeout_s=0.02)
    source, _ = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    fabric.stall("source")
    with pytest.raises(PeerLostError, match="too long"):
        await target.read("source", source.endpoint(), [2], [3])
    fabric.restore("source")
    await asyncio.sleep(0.01)
    assert not ours.any()


async def test_time_of_a_stall_does_not_count_as_transfer_time() -> None:
    fabric = LocalFabric(latency_s=0.05)
    source, _ = _instance(fabric, "source")
    target, _ = _instance(fabric, "target")
    began = time.monotonic()
    task = asyncio.create_task(target.read("source", source.endpoint(), [0], [0]))
    await asyncio.sleep(0.02)
    fabric.stall("source")
    await asyncio.sleep(0.05)
    fabric.restore("source")
    await task
    assert time.monotonic() - began > 0.095


async def test_nothing_is_written_after_a_cancel() -> None:
    fabric = LocalFabric(latency_s=0.02)
    source, _ = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    task = asyncio.create_task(target.read("source", source.endpoint(), [2], [3]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.04)
    assert not ours.any()


async def test_instance_started_anew_is_another_one() -> None:
    fabric = LocalFabric()
    old, _ = _instance(fabric, "source")
    target, _ = _instance(fabric, "target")
    new, _ = _instance(fabric, "source")
    with pytest.raises(PeerLostError):
        await target.read("source", old.endpoint(), [0], [0])
    old.close()
    assert await target.read("source", new.endpoint(), [0], [0])


@pytest.mark.parametrize("which", ["source", "target"])
async def test_close_ends_reads_on_both_sides(which: str) -> None:
    fabric = LocalFabric(latency_s=60)
    source, _ = _instance(fabric, "source")
    target, _ = _instance(fabric, "target")
    task = asyncio.create_task(target.read("source", source.endpoint(), [0], [0]))
    await asyncio.sleep(0.01)
    {"source": source, "target": target}[which].close()
    with pytest.raises(PeerLostError):
        await task
    source.close()
    target.close()


async def test_forget_ends_reads_of_that_peer_only() -> None:
    fabric = LocalFabric(latency_s=0.05)
    source, _ = _instance(fabric, "source")
    other, _ = _instance(fabric, "other")
    target, _ = _instance(fabric, "target")
    lost = asyncio.create_task(target.read("source", source.endpoint(), [0], [0]))
    kept = asyncio.create_task(target.read("other", other.endpoint(), [0], [0]))
    await asyncio.sleep(0.01)
    target.forget("source")
    target.forget("nobody")
    with pytest.raises(PeerLostError):
        await lost
    assert await kept
    assert await target.read("source", source.endpoint(), [0], [0])


async def test_memory_that_is_not_there_takes_time_and_copies_nothing() -> None:
    fabric = LocalFabric(bytes_per_s=1e6)
    ends = [fabric.transport(name) for name in ("source", "target")]
    for end in ends:
        end.register([KvRegion(0, 1000, 10_000)])
    began = time.monotonic()
    assert await ends[1].read("source", ends[0].endpoint(), [0, 1], [998, 999]) == 20_000
    assert time.monotonic() - began > 0.019


async def test_wrong_calls_are_refused() -> None:
    fabric = LocalFabric()
    source, _ = _instance(fabric, "source")
    target, ours = _instance(fabric, "target", fill=0)
    with pytest.raises(ValueError, match="out of range"):
        await target.read("source", source.endpoint(), [0, BLOCKS], [0, 1])
    with pytest.raises(ValueError, match="out of range"):
        await target.read("source", source.endpoint(), [0], [-1])
    with pytest.raises(ValueError, match="zip"):
        await target.read("source", source.endpoint(), [0, 1], [1])
    with pytest.raises(ValueError, match="endpoint"):
        await target.read("source", b"\xc1", [0], [1])
    with pytest.raises(ValueError, match="once"):
        source.register(source.regions)
    odd = fabric.transport("odd")
    with pytest.raises(ValueError, match="host memory"):
        odd.register([KvRegion(4096, 1, 1, device_id=0)])
    odd.register([KvRegion(0, 1, 1)])
    with pytest.raises(ValueError, match="differ"):
        await odd.read("source", source.endpoint(), [0], [0])
    assert not ours.any()
