"""Slices of blocks by KV heads: every byte of a block is read once, by whatever widths the two sides have."""

import ctypes
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from migration.transport.head_slices import common_heads, paired_rows, plan, rows_of
from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.local import LocalFabric
from migration.transport.ranked import RankedTransport

BLOCKS = 4


def heads_of(total: int, ranks: int) -> list[KvHeads]:
    """As vLLM divides them: equal shares, or one head to several ranks."""
    return [KvHeads(rank * total // ranks, max(1, total // ranks)) for rank in range(ranks)]


#: Heads and the widths of both sides.
SIZES = st.integers(1, 12).flatmap(
    lambda total: st.tuples(
        st.just(total),
        *[st.sampled_from([n for n in (1, 2, 3, 4, 8) if not (total % n and n % total)])] * 2,
    )
)


class Side:
    """An instance: the whole cache, and of it what each rank has.

    Args:
        parts: Of each region.
    """

    def __init__(self, name: str, total: int, ranks: int, parts: list[int], fill: int) -> None:
        self.fabric = LocalFabric()
        self.name, self.total, self.parts = name, total, parts
        self.heads = heads_of(total, ranks)
        self.memory = [
            [bytearray([fill]) * (BLOCKS * self.row(heads, of_region)) for of_region in parts]
            for heads in self.heads
        ]

    @staticmethod
    def head_bytes(parts: int) -> int:
        return 3 + parts  # another size in each region

    def row(self, heads: KvHeads, parts: int) -> int:
        return parts * heads.number * self.head_bytes(parts)

    def regions(self, rank: int) -> list[KvRegion]:
        heads = self.heads[rank]
        return [
            KvRegion(
                ctypes.addressof(ctypes.c_char.from_buffer(memory)),
                BLOCKS,
                self.row(heads, parts),
                heads=heads,
                parts=parts,
            )
            for memory, parts in zip(self.memory[rank], self.parts, strict=True)
        ]

    def write_contents(self) -> None:
        """Bytes that tell region, block, part, head and place."""
        for rank, heads in enumerate(self.heads):
            for region, parts in enumerate(self.parts):
                for block in range(BLOCKS):
                    begin = block * self.row(heads, parts)
                    self.memory[rank][region][begin : begin + self.row(heads, parts)] = self.contents(
                        region, block, heads
                    )

    def contents(self, region: int, block: int, heads: KvHeads) -> bytes:
        parts = self.parts[region]
        return bytes(
            (region * 83 + block * 59 + part * 31 + head * 13 + place) % 251
            for part in range(parts)
            for head in range(heads.first, heads.end)
            for place in range(self.head_bytes(parts))
        )

    def transport(self, fabric: LocalFabric) -> RankedTransport:
        ranks = [fabric.transport(f"{self.name}/{rank}") for rank in range(len(self.heads))]
        for index, rank in enumerate(ranks):
            rank.register(self.regions(index))
        return RankedTransport(ranks)


@given(SIZES, st.lists(st.integers(1, 3), min_size=1, max_size=3))
async def test_what_was_copied_is_what_an_undivided_block_has(
    sizes: tuple[int, int, int], parts: list[int]
) -> None:
    total, width, peer_width = sizes
    fabric = LocalFabric()
    source = Side("source", total, peer_width, parts, 0)
    target = Side("target", total, width, parts, 255)
    source.write_contents()
    remote, local = [2, 0, 3], [1, 3, 0]

    copied = await target.transport(fabric).read("source", source.transport(fabric).endpoint(), remote, local)

    assert copied == len(local) * sum(target.row(heads, p) for heads in target.heads for p in parts)
    for rank, heads in enumerate(target.heads):
        for region, of_region in enumerate(parts):
            row, memory = target.row(heads, of_region), target.memory[rank][region]
            for theirs, ours in zip(remote, local, strict=True):
                assert memory[ours * row :][:row] == source.contents(region, theirs, heads)
            assert set(memory[2 * row : 3 * row]) == {255}, "a block that was not named"


@given(SIZES)
def test_every_head_of_every_rank_is_read_once(sizes: tuple[int, int, int]) -> None:
    total, width, peer_width = sizes
    ours, theirs = heads_of(total, width), heads_of(total, peer_width)
    for rank, mine in enumerate(ours):
        reads = [read for read in plan(ours, theirs) if read.rank == rank]
        read = [head for r in reads for head in _range(r.heads or mine)]
        assert read == list(_range(mine))
        for one in reads:
            assert set(_range(one.heads or mine)) <= set(_range(theirs[one.peer_rank]))


@given(
    st.lists(st.builds(KvHeads, st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from([(4, 1), (4, 2), (4, 4), (1, 2), (8, 2)]),
)
@example([KvHeads(0, 3), KvHeads(1, 3)], (4, 1))
@example([KvHeads(0, 2), KvHeads(3, 1)], (4, 1))
def test_a_peer_that_lies_is_refused_or_read_within_what_it_said(
    theirs: list[KvHeads], sizes: tuple[int, int]
) -> None:
    """Whatever it says: no head here is left as it was, and none is written twice."""
    ours = heads_of(*sizes)
    try:
        planned = plan(ours, theirs)
    except ValueError:
        return
    for rank, mine in enumerate(ours):
        reads = [read for read in planned if read.rank == rank]
        assert [head for r in reads for head in _range(r.heads or mine)] == list(_range(mine))
        for read in reads:
            assert set(_range(read.heads or mine)) <= set(_range(theirs[read.peer_rank]))


def _range(heads: KvHeads) -> range:
    return range(heads.first, heads.end)


def test_readers_of_a_replicated_head_spread_over_the_ranks_that_have_it() -> None:
    """As with MLA."""
    assert [read.peer_rank for read in plan(heads_of(1, 4), heads_of(1, 2))] == [0, 0, 1, 1]
    assert [read.peer_rank for read in plan(heads_of(1, 2), heads_of(1, 4))] == [0, 2]
    assert [read.peer_rank for read in plan(heads_of(2, 8), heads_of(2, 4))] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("heads", [heads_of(4, 2), [None, None]])
def test_equal_widths_read_whole_blocks_rank_by_rank(heads: list[KvHeads | None]) -> None:
    assert plan(heads, heads) == [(0, 0, None), (1, 1, None)]


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (heads_of(4, 2), heads_of(4, 2)[::-1], "other KV heads"),
        (heads_of(4, 2), [None, None], "other KV heads"),
        (heads_of(4, 2), [None], "1 ranks instead of 2, and blocks are not divided by heads"),
        ([None], heads_of(4, 2), "2 ranks instead of 1, and blocks are not divided by heads"),
        (heads_of(4, 2), [], "0 KV heads instead of 4"),
        (heads_of(4, 1), heads_of(8, 2), "8 KV heads instead of 4"),
        (heads_of(4, 1), [KvHeads(0, 2), KvHeads(3, 1)], "no rank of the peer has KV head 2"),
    ],
)
def test_ranks_that_do_not_have_what_is_needed_are_refused(
    ours: list[KvHeads | None], theirs: list[KvHeads | None], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        plan(ours, theirs)


@pytest.mark.parametrize("heads", [KvHeads(0, 2), KvHeads(3, 2), KvHeads(4, 1)])
def test_heads_that_a_region_does_not_have_are_no_slice_of_it(heads: KvHeads) -> None:
    region = KvRegion(0, BLOCKS, 12, heads=KvHeads(1, 3))
    for regions in ([region], [replace(region, heads=None)]):
        with pytest.raises(ValueError, match="not in all regions"):
            rows_of(regions, heads)


@pytest.mark.parametrize(
    "lie",
    [
        {"parts": 3},
        {"block_bytes": 48, "parts": 4},
        {"block_bytes": 48},
        {"heads": KvHeads(0, 3)},
        {"block_bytes": 24 << 30, "parts": 2 << 30},  # slices of it would fill the memory
    ],
)
def test_regions_that_are_divided_in_another_way_are_not_sliced(lie: dict[str, object]) -> None:
    ours = KvRegion(0, 1, 24, heads=KvHeads(0, 4), parts=2)
    theirs = replace(ours, heads=KvHeads(0, 2), block_bytes=12)
    assert [row.size for row in paired_rows([ours], [theirs], KvHeads(0, 2))[1]] == [6, 6]
    for regions in ([replace(theirs, **lie)], [theirs, theirs]):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="differ from the local ones"):
            paired_rows([ours], regions, KvHeads(0, 2))


def test_slices_of_a_block_do_not_overlap() -> None:
    region = KvRegion(1000, BLOCKS, 24, heads=KvHeads(2, 4), parts=2)
    rows = [row for head in range(2, 6) for row in rows_of([region], KvHeads(head, 1))]
    assert all((row.size, row.stride, row.number) == (3, 24, BLOCKS) for row in rows)
    begins = sorted(row.address for row in rows)
    assert begins[0] == 1000
    assert all(after - before == 3 for before, after in pairwise(begins))


def test_a_rank_has_heads_only_if_all_its_regions_have_the_same() -> None:
    one, other = (KvRegion(0, 1, 4, heads=KvHeads(first, 1)) for first in (0, 1))
    assert common_heads([one, one]) == KvHeads(0, 1)
    assert common_heads([one, other]) is None
    assert common_heads([one, replace(one, heads=None)]) is None
    assert common_heads([]) is None


@pytest.mark.parametrize(
    "numbers",
    [
        {"block_bytes": 7, "heads": KvHeads(0, 2)},
        {"block_bytes": 4, "heads": KvHeads(0, 2), "parts": 4},
        {"parts": 0},
        {"address": -1},
        {"num_blocks": 1 << 62},
    ],
)
def test_numbers_that_describe_no_memory_are_no_region(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"heads|memory"):
        KvRegion(**{"address": 0, "num_blocks": 1, "block_bytes": 8} | numbers)  # type: ignore[arg-type]
    for first, number in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="not a range of heads"):
            KvHeads(first, number)
