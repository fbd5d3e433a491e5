"""From an engine's KV cache tensors to the regions a transport moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from migration.transport.kv_transport import KvRegion

if TYPE_CHECKING:
    import torch


def kv_regions(
    tensors: Iterable[torch.Tensor], num_blocks: int, block_axis: int | None = None
) -> list[KvRegion]:
    """Describes KV cache tensors as regions of equally sized blocks.

    What counts is where the bytes lie, not the order of the axes: axes with a smaller stride than
    `block_axis` are inside a block, the others enumerate regions. So `(2, blocks, ...)` with K and V
    apart gives two regions a tensor, `(blocks, 2, ...)` one, and a view of the latter's memory in the
    former's shape still one.

    Args:
        tensors: One per attention layer, in layer order, on the CPU or on CUDA. Layers that share
            memory (same address) give one region.
        num_blocks: Blocks in each tensor: its size along `block_axis`.
        block_axis: The axis that counts blocks; the same for all tensors. By default a tensor's first
            axis of size `num_blocks`.

    Returns:
        The regions in order of tensors, then of outer index. They point into the tensors, which the
        caller keeps alive.

    Raises:
        ValueError: A tensor has another number of blocks, or its blocks are not contiguous.
    """
    regions: dict[tuple[int, int], KvRegion] = {}
    for index, tensor in enumerate(tensors):
        for region in _tensor_regions(tensor, index, num_blocks, block_axis):
            known = regions.setdefault((region.device_id, region.address), region)
            if known != region:
                raise ValueError(
                    f"KV cache tensor {index} starts where another one does, but with blocks of "
                    f"{region.block_bytes} bytes instead of {known.block_bytes}"
                )
    return list(regions.values())


def block_order(tensors: Iterable[torch.Tensor], num_blocks: int) -> str:
    """The order of the elements inside a block, in words. Blocks of one size may have several (NHD, HND).

    Args:
        tensors: As those of `kv_regions`, which has accepted them.

    Returns:
        Data type, and (axis, size, stride in elements) of each axis inside a block, from the outermost; once
        for tensors that are alike. The same for any number of blocks.
    """
    orders: dict[str, None] = {}
    for tensor in tensors:
        axis, inner, outer = _axes(tensor, num_blocks, None)
        assert axis is not None, "kv_regions accepts no such tensor"
        size, stride = tensor.shape, tensor.stride()
        inside = [f"axis {i} {size[i]} x {stride[i]}" for i in sorted(inner, key=lambda i: -stride[i])]
        outside = [f"axis {i} {size[i]} regions" for i in outer]
        orders[f"{tensor.dtype} blocks on axis {axis}: {', '.join(inside + outside)}"] = None
    return "; ".join(orders)


def _axes(
    tensor: torch.Tensor, num_blocks: int, block_axis: int | None
) -> tuple[int | None, list[int], list[int]]:
    """The axis that counts blocks (None: there is none), those inside a block, and those outside."""
    shape, stride = tensor.shape, tensor.stride()
    axes = list(range(len(shape)))
    candidates = axes if block_axis is None else axes[block_axis:][:1]
    axis = next((i for i in candidates if shape[i] == num_blocks), None)
    # An axis of size 1 has no extent, whatever its stride says.
    others = [i for i in axes if i != axis and shape[i] > 1]
    if axis is None or num_blocks == 1:
        return axis, others, []
    inner = [i for i in others if stride[i] < stride[axis]]
    return axis, inner, [i for i in others if i not in inner]


def _tensor_regions(
    tensor: torch.Tensor, index: int, num_blocks: int, block_axis: int | None
) -> Iterable[KvRegion]:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    where = f"KV cache tensor {index} (shape {shape}, strides {stride})"
    axis, inner, outer = _axes(tensor, num_blocks, block_axis)
    if axis is None:
        along = "any axis" if block_axis is None else f"axis {block_axis}"
        raise ValueError(f"{where} has not {num_blocks} blocks along {along}")
    dense = 1
    for i in sorted(inner, key=lambda i: stride[i]):
        if stride[i] != dense:
            raise ValueError(f"{where} leaves gaps inside a block: blocks must be contiguous to be moved")
        dense *= shape[i]
    if num_blocks > 1 and stride[axis] != dense:
        raise ValueError(
            f"{where} has blocks of {dense} elements that are {stride[axis]} elements apart: "
            "blocks must be contiguous and touch each other to be moved"
        )
    size = tensor.element_size()
    for combination in itertools.product(*(range(shape[i]) for i in outer)):
        offset = sum(step * stride[i] for step, i in zip(combination, outer, strict=True))
        yield KvRegion(
            address=tensor.data_ptr() + offset * size,
            num_blocks=num_blocks,
            block_bytes=dense * size,
            device_id=tensor.get_device(),
        )
