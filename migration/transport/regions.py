"""From an engine's KV cache tensors to the regions a transport moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from migration.transport.kv_transport import KvHeads, KvRegion

if TYPE_CHECKING:
    import torch


def kv_regions(tensors: Iterable[torch.Tensor], num_blocks: int) -> list[KvRegion]:
    """Describes KV cache tensors as regions of equally sized blocks.

    vLLM views one allocation as `[blocks, ...]` for each layer, and cache groups overlay each other in it:
    what a block id stands for is one row of bytes through all of the memory, whatever is in it. A row may
    have gaps (pages are padded to one size), and the first axis may count kernel blocks, several of which are
    a block.

    Args:
        tensors: One per layer, in layer order, on the CPU or on CUDA.
        num_blocks: Blocks of the whole cache.

    Returns:
        The regions, each address once. They point into the tensors, which the caller keeps alive.

    Raises:
        ValueError: A tensor is not made of `num_blocks` rows, or regions overlap.

    Source: copy_kv_cache_blocks_inplace and allocate_kv_cache in vllm/v1/worker/utils.py.
    """
    regions: dict[tuple[int, int], KvRegion] = {}
    for index, tensor in enumerate(tensors):
        row = _row_bytes(tensor, index, num_blocks)
        storage = tensor.untyped_storage()
        is_whole = num_blocks * row <= storage.nbytes() < (num_blocks + 1) * row
        address = storage.data_ptr() if is_whole else tensor.data_ptr()
        region = KvRegion(address, num_blocks, row, tensor.get_device())
        if address + num_blocks * row > storage.data_ptr() + storage.nbytes():
            raise ValueError(f"{_name(tensor, index)} shares its blocks with other tensors")
        if regions.setdefault((region.device_id, address), region) != region:
            raise ValueError(f"{_name(tensor, index)} starts where another one does, with other blocks")
    _check_apart(list(regions.values()))
    return list(regions.values())


def divided_by_heads(
    regions: Sequence[KvRegion],
    tensors: Sequence[torch.Tensor],
    num_blocks: int,
    heads: KvHeads,
    total: int,
) -> list[KvRegion]:
    """The regions with what each of their blocks holds.

    Args:
        regions: What `kv_regions` has made of `tensors`.
        tensors: With the axes [kernel blocks, heads, tokens, ...], as vLLM views them.
        heads: What each tensor holds.
        total: Heads of all ranks. The only one is a whole block, whatever is in it.

    Raises:
        ValueError: A block is not made of heads, each of them in one piece, one after the other.
    """
    if total == 1:
        return [replace(region, heads=heads) for region in regions]
    return [_divided(region, tensors, num_blocks, heads) for region in regions]


def _divided(region: KvRegion, tensors: Sequence[torch.Tensor], num_blocks: int, heads: KvHeads) -> KvRegion:
    pieces = {
        (start - region.address, size, head)
        for tensor in tensors
        if tensor.get_device() == region.device_id
        for start, size, head in _pieces(tensor, num_blocks, heads.number)
        if region.address <= start < region.address + region.block_bytes
    }
    ordered, end = sorted(pieces), 0
    for index, (start, size, head) in enumerate(ordered):
        if (start, size, head) != (end, ordered[0][1], index % heads.number):
            raise ValueError("heads do not lie one after the other in a block")
        end += size
    if end != region.block_bytes or len(ordered) % heads.number:
        raise ValueError("blocks have gaps between heads")
    return replace(region, heads=heads, parts=len(ordered) // heads.number)


def _pieces(tensor: torch.Tensor, num_blocks: int, num_heads: int) -> Iterator[tuple[int, int, int]]:
    """Address, bytes and number of each head of a tensor's first block."""
    if tensor.dim() < 3 or tensor.shape[1] != num_heads:
        raise ValueError(f"a block has no axis of {num_heads} heads")
    if not tensor[0, 0].is_contiguous():
        raise ValueError("a head is not in one piece")
    for kernel_block in range(tensor.shape[0] // num_blocks):
        for head in range(num_heads):
            piece = tensor[kernel_block, head]
            yield piece.data_ptr(), piece.numel() * piece.element_size(), head


def block_order(tensors: Iterable[torch.Tensor], num_blocks: int, *, of_a_head: bool = False) -> str:
    """The order of the elements inside a block, in words. Blocks of one size may have several (NHD, HND).

    Args:
        tensors: As those of `kv_regions`, which has accepted them.
        of_a_head: Only of one head, which does not depend on their number.

    Returns:
        Data type, kernel blocks of a block, and size and stride in elements of each axis inside one; once for
        tensors that are alike. The same for any number of blocks.
    """
    orders: dict[str, None] = {}
    for tensor in tensors:
        first = 2 if of_a_head else 1
        axes = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
        inside = ", ".join(f"{size} x {stride if size > 1 else 0}" for size, stride in axes)
        orders[f"{tensor.dtype} {tensor.shape[0] // num_blocks} x ({inside})"] = None
    return "; ".join(orders)


def _row_bytes(tensor: torch.Tensor, index: int, num_blocks: int) -> int:
    """Bytes from one block to the next. Raises: ValueError: the tensor is not made of rows."""
    kernel_blocks, rest = divmod(tensor.shape[0], num_blocks)
    if rest or not kernel_blocks:
        raise ValueError(f"{_name(tensor, index)} has not {num_blocks} blocks along its first axis")
    # An axis of size 1 has no extent, whatever its stride says.
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    stride = tensor.stride(0) if tensor.shape[0] > 1 else extent
    if extent > stride:
        raise ValueError(f"{_name(tensor, index)} has blocks that are in each other's way")
    return int(stride * tensor.element_size() * kernel_blocks)


def _check_apart(regions: list[KvRegion]) -> None:
    ordered = sorted(regions, key=lambda region: (region.device_id, region.address))
    for before, after in itertools.pairwise(ordered):
        end = before.address + before.num_blocks * before.block_bytes
        if before.device_id == after.device_id and end > after.address:
            raise ValueError("layers of the KV cache are interleaved in memory, with blocks of several sizes")


def _name(tensor: torch.Tensor, index: int) -> str:
    return f"KV cache tensor {index} (shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())})"
