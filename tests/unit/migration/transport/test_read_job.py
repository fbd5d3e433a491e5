"""The chunks of a read: each as large as the last ones say that a link moves in the time of one."""

import asyncio

import numpy as np
import pytest

from migration.transport.nixl_connections import ReadPath
from migration.transport.read_job import (
    CHUNK_S,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Chunk,
    ReadJob,
)

BLOCK_BYTES = 1 << 20


def read_of(num_blocks: int, block_bytes: int = BLOCK_BYTES) -> ReadJob:
    loop = asyncio.get_running_loop()
    blocks = np.arange(num_blocks, dtype=np.int32)
    return ReadJob(
        peer="peer",
        path=ReadPath(b"", ()),
        block_bytes=block_bytes,
        remote_blocks=blocks,
        local_blocks=blocks,
        deadline=1e9,
        loop=loop,
        done=loop.create_future(),
        quiet=loop.create_future(),
    )


def blocks_in(chunk: Chunk) -> int:
    return int(chunk.pairs.stop - chunk.pairs.start)


def moved_at(job: ReadJob, bytes_per_s: float) -> list[Chunk]:
    """Moves the whole job over a link of this rate, one chunk after the other."""
    now, chunks = 0.0, []
    while job.waiting:
        chunk = job.next_chunk(now)
        now += blocks_in(chunk) * job.block_bytes / bytes_per_s
        job.chunk_ended(chunk, now)
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("bytes_per_s", [2.2e9, 5e9, 20e9])
async def test_chunks_soon_take_their_time_whatever_the_link(bytes_per_s: float) -> None:
    chunks = moved_at(read_of(4096), bytes_per_s)

    assert blocks_in(chunks[0]) * BLOCK_BYTES == MIN_CHUNK_BYTES
    for chunk in chunks[5:-1]:
        took = blocks_in(chunk) * BLOCK_BYTES / bytes_per_s
        assert CHUNK_S - BLOCK_BYTES / bytes_per_s < took <= CHUNK_S
    ends = [chunk.pairs.stop for chunk in chunks]
    assert [chunk.pairs.start for chunk in chunks] == [0, *ends[:-1]], "each block once, in order"
    assert ends[-1] == 4096


@pytest.mark.parametrize(("bytes_per_s", "last"), [(1e6, MIN_CHUNK_BYTES), (1e12, MAX_CHUNK_BYTES)])
async def test_chunks_of_very_slow_and_very_fast_links_have_bounds(bytes_per_s: float, last: int) -> None:
    chunks = moved_at(read_of(4096), bytes_per_s)

    assert blocks_in(chunks[-2]) * BLOCK_BYTES == last


async def test_a_chunk_that_was_held_up_halves_the_next_one_at_most() -> None:
    job = read_of(256)
    job.chunk_bytes = 32 << 20
    job.chunk_ended(job.next_chunk(0.0), 10.0)

    assert blocks_in(job.next_chunk(10.0)) == 16


async def test_the_time_of_a_chunk_is_without_that_behind_another_one() -> None:
    job = read_of(256)
    job.chunk_bytes = 32 << 20
    first, second = job.next_chunk(0.0), job.next_chunk(0.0)
    job.chunk_ended(first, CHUNK_S)
    job.chunk_ended(second, 2 * CHUNK_S)

    assert job.chunk_bytes == pytest.approx(32 << 20)


async def test_the_time_that_a_copy_took_counts_and_not_how_long_its_thread_waited() -> None:
    job = read_of(256)
    job.chunk_bytes = 32 << 20
    job.chunk_ended(job.next_chunk(0.0), 10.0, took_s=CHUNK_S)

    assert job.chunk_bytes == pytest.approx(32 << 20)


async def test_a_block_larger_than_a_chunk_is_one() -> None:
    assert [blocks_in(chunk) for chunk in moved_at(read_of(3, 1 << 30), 5e9)] == [1, 1, 1]


async def test_what_was_put_back_is_posted_again_first_and_in_order() -> None:
    job = read_of(12)
    posted = [job.next_chunk(0.0).pairs for _ in range(2)]
    job.put_back()

    assert not job.under_way
    assert [job.next_chunk(1.0).pairs for _ in range(3)] == [*posted, slice(8, 12)]
    assert not job.waiting
