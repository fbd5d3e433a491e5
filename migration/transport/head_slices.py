"""Which ranks of a peer a rank reads from, and which bytes of each block, where the two have different sizes.

With equal sizes each rank reads whole blocks from the peer's same rank. Otherwise it reads slices of blocks:
of each block the KV heads that it has, from the ranks of the peer that have them. All ranks share the tables
of blocks, so nothing else of a migration depends on their number.

Source: compute_tp_mapping in vllm/distributed/kv_transfer/kv_connector/v1/nixl/tp_mapping.py, which does the
same for sizes that divide each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from migration.transport.kv_transport import KvHeads, KvRegion


class RankRead(NamedTuple):
    """What one rank reads from one rank of a peer.

    Attributes:
        rank: The one that reads.
        peer_rank: The one that it reads from.
        heads: None for whole blocks.
    """

    rank: int
    peer_rank: int
    heads: KvHeads | None


@dataclass(frozen=True, slots=True)
class KvRows:
    """One run of bytes of each block of a region.

    Attributes:
        address: That of block 0, in bytes. Row i starts at `address + i * stride`.
        number: Blocks of the region.
        size: Bytes of a row.
        stride: Bytes from one row to the next.
        device_id: CUDA ordinal, or -1 for host memory.
    """

    address: int
    number: int
    size: int
    stride: int
    device_id: int = -1


def plan(ours: Sequence[KvHeads | None], theirs: Sequence[KvHeads | None]) -> list[RankRead]:
    """The reads that together fill the blocks of all ranks, each head once.

    Args:
        ours: The heads of each rank here.
        theirs: Those of each rank of the peer.

    Raises:
        ValueError: The two do not have the same heads, or blocks are not divided by heads.
    """
    if len(ours) == len(theirs):
        if list(ours) != list(theirs):
            raise ValueError("the peer's ranks have other KV heads than those here")
        return [RankRead(rank, rank, None) for rank in range(len(ours))]
    our_heads, their_heads = ([heads for heads in ranks if heads is not None] for ranks in (ours, theirs))
    if (len(our_heads), len(their_heads)) != (len(ours), len(theirs)):
        text = f"the peer has {len(theirs)} ranks instead of {len(ours)}"
        raise ValueError(f"{text}, and blocks are not divided by heads")
    ends = [max((heads.end for heads in ranks), default=0) for ranks in (our_heads, their_heads)]
    if ends[0] != ends[1]:
        raise ValueError(f"the peer has {ends[1]} KV heads instead of {ends[0]}")
    return [
        RankRead(rank, source, None if heads == mine == their_heads[source] else heads)
        for rank, mine in enumerate(our_heads)
        for source, heads in _sources(rank, mine, len(ours), their_heads)
    ]


def _sources(
    rank: int, mine: KvHeads, num_ranks: int, theirs: Sequence[KvHeads]
) -> Iterator[tuple[int, KvHeads]]:
    """The ranks that have the heads of this one. Where several have the same, ranks spread over them."""
    first, place = mine.first, rank * len(theirs) // num_ranks
    while first < mine.end:
        having = [index for index, heads in enumerate(theirs) if heads.first <= first < heads.end]
        if not having:
            raise ValueError(f"no rank of the peer has KV head {first}")
        source = min(having, key=lambda index: abs(index - place))
        end = min(mine.end, theirs[source].end)
        yield source, KvHeads(first, end - first)
        first = end


def paired_rows(
    ours: Sequence[KvRegion], theirs: Sequence[KvRegion], heads: KvHeads | None
) -> tuple[list[KvRows], list[KvRows]]:
    """The rows here and at a peer that hold these heads, or whole blocks, each with its counterpart.

    Raises:
        ValueError: The regions of the two differ; nothing was made of what the peer says.
    """
    sizes = [
        [region.block_bytes if heads is None else (region.parts, region.head_bytes) for region in side]
        for side in (ours, theirs)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError("the peer's KV regions differ from the local ones in number or block size")
    return rows_of(ours, heads), rows_of(theirs, heads)


def rows_of(regions: Sequence[KvRegion], heads: KvHeads | None) -> list[KvRows]:
    """The rows that hold these heads, or whole blocks, in the order of the regions.

    Raises:
        ValueError: A region does not have these heads.
    """
    if heads is not None:
        return [rows for region in regions for rows in _slices(region, heads)]
    return [KvRows(r.address, r.num_blocks, r.block_bytes, r.block_bytes, r.device_id) for r in regions]


def _slices(region: KvRegion, heads: KvHeads) -> Iterator[KvRows]:
    held = region.heads
    if held is None or not held.first <= heads.first < heads.end <= held.end:
        raise ValueError(f"heads {heads.first} to {heads.end - 1} are not in all regions of a rank")
    offset, size = (heads.first - held.first) * region.head_bytes, heads.number * region.head_bytes
    for part in range(region.parts):
        address = region.address + part * held.number * region.head_bytes + offset
        yield KvRows(address, region.num_blocks, size, region.block_bytes, region.device_id)


def common_heads(regions: Sequence[KvRegion]) -> KvHeads | None:
    """The heads of all regions of a rank; None if they differ, or are not known."""
    several = {region.heads for region in regions}
    return several.pop() if len(several) == 1 else None
