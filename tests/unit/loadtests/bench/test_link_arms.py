"""Each way to read copies the same blocks, and only those."""

from collections.abc import Iterator

import pytest

from loadtests.bench import link_arms
from loadtests.bench.link_arms import LinkArm, Memcpy, NixlAlone, OurTransport
from loadtests.bench.link_memory import BlockOwner, CacheLayout, CacheMemory
from migration.transport.nixl import NixlTransport

SMALL = CacheLayout("small", regions=3, row_bytes=4096, blocks=16)


@pytest.fixture
def local() -> CacheMemory:
    return CacheMemory(SMALL)


@pytest.fixture
def transport(local: CacheMemory) -> Iterator[NixlTransport]:
    transport = NixlTransport("reader")
    transport.register(local.kv_regions)
    yield transport
    transport.close()


async def _reads(arm: LinkArm, local: CacheMemory) -> None:
    for remote, blocks in (([2, 3, 7], [9, 0, 1]), ([1], [15])):  # the second time it reads others
        local.rows[:] = 0
        arm.choose(remote, blocks)
        await arm.read()
        assert local.holds(remote, blocks)
        assert int(local.rows.any(axis=(0, 2)).sum()) == len(blocks)


async def test_all_ways_copy_the_same_blocks(local: CacheMemory, transport: NixlTransport) -> None:
    source = CacheMemory(SMALL)
    source.fill()
    async with BlockOwner(SMALL) as owner:
        nixl = NixlAlone(owner, local)
        for arm in (Memcpy(source, local), nixl, OurTransport(transport, owner, SMALL.block_bytes)):
            await _reads(arm, local)
        nixl.close()


async def test_a_paced_read_goes_in_slices_at_its_rate(
    local: CacheMemory, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_arms, "SLICE_BYTES", 2 * SMALL.block_bytes)
    copied: list[int] = []
    async with BlockOwner(SMALL) as owner:
        arm = OurTransport(transport, owner, SMALL.block_bytes, 1e12)
        pace = arm._pacer.copied

        async def recorded(num_bytes: int) -> None:
            copied.append(num_bytes // SMALL.block_bytes)
            await pace(num_bytes)

        monkeypatch.setattr(arm._pacer, "copied", recorded)
        await _reads(arm, local)

    assert copied == [2, 1, 1]
