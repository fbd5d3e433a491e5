"""The memory whose blocks are read, and the process that owns it."""

import pytest

from loadtests.bench import link_memory
from loadtests.bench.link_memory import BlockOwner, CacheLayout, CacheMemory
from pd_serve.errors import PdServeError

SMALL = CacheLayout("small", regions=3, row_bytes=64, blocks=8)


def test_a_filled_cache_tells_which_blocks_were_copied() -> None:
    owned, local = CacheMemory(SMALL), CacheMemory(SMALL)
    owned.fill()
    assert not local.holds([3, 5], [0, 1])

    local.rows[:, [0, 1]] = owned.rows[:, [3, 5]]

    assert local.holds([3, 5], [0, 1])
    assert not local.holds([5, 3], [0, 1])
    local.rows[2, 1, 63] = 0
    assert not local.holds([3, 5], [0, 1]), "the last byte of a row in the last region"


def test_regions_are_where_the_rows_are() -> None:
    memory = CacheMemory(SMALL)

    assert [region.address for region in memory.kv_regions] == [part.ctypes.data for part in memory.rows]
    assert {(region.num_blocks, region.block_bytes) for region in memory.kv_regions} == {(8, 64)}
    assert SMALL.block_bytes == 3 * 64


async def test_the_owner_says_where_its_blocks_are() -> None:
    async with BlockOwner(SMALL) as owner:
        assert [region.num_blocks for region in owner.kv_regions] == [8] * 3
        assert owner.endpoint
        assert owner.metadata


async def test_an_owner_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_memory, "_own", print)  # ends at once

    with pytest.raises(PdServeError, match="has ended"):
        await BlockOwner(SMALL).__aenter__()
