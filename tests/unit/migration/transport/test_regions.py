"""`kv_regions` on the layouts that vLLM gives its KV cache: one allocation, viewed for each layer."""

import pytest
import torch

from migration.transport.kv_transport import KvHeads, KvRegion
from migration.transport.regions import block_order, divided_by_heads, kv_regions

BLOCKS, LAYERS, HEADS, TOKENS, DIM = 6, 3, 2, 4, 8


def _numbered(*shape: int) -> torch.Tensor:
    """A cache in which each element knows its place."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(count, dtype=torch.int64).reshape(shape)


def test_layers_one_after_the_other_are_a_region_each() -> None:
    memory = _numbered(LAYERS, BLOCKS, HEADS, TOKENS, DIM)
    regions = kv_regions(list(memory), BLOCKS)
    assert [r.address for r in regions] == [layer.data_ptr() for layer in memory]
    assert {(r.num_blocks, r.block_bytes, r.device_id) for r in regions} == {
        (BLOCKS, HEADS * TOKENS * DIM * 8, -1)
    }
    # Block i is where the region says.
    assert regions[1].address + 3 * regions[1].block_bytes == memory[1, 3].data_ptr()


def test_layers_inside_each_block_are_one_region() -> None:
    memory = _numbered(BLOCKS, LAYERS, HEADS, TOKENS, DIM)
    (region,) = kv_regions([memory[:, layer] for layer in range(LAYERS)], BLOCKS)
    assert (region.address, region.block_bytes) == (memory.data_ptr(), memory[0].numel() * 8)


def test_axes_inside_a_block_may_be_permuted() -> None:
    memory = _numbered(LAYERS, BLOCKS, HEADS, TOKENS, DIM)
    assert kv_regions(list(memory.permute(0, 1, 3, 2, 4)), BLOCKS) == kv_regions(list(memory), BLOCKS)


def test_groups_that_overlay_each_other_are_one_region() -> None:
    """Attention pages, and states that use a part of a page of the same size."""
    pages = _numbered(LAYERS, BLOCKS, HEADS * TOKENS * DIM)
    states = pages[:, :, : DIM + 3]
    assert kv_regions([*pages, *states], BLOCKS) == kv_regions(list(pages), BLOCKS)
    assert kv_regions([*states, *pages], BLOCKS) == kv_regions(list(pages), BLOCKS)


def test_kernel_blocks_are_parts_of_a_block() -> None:
    memory = _numbered(LAYERS, BLOCKS * 4, HEADS, TOKENS, DIM)
    regions = kv_regions(list(memory), BLOCKS)
    assert regions == kv_regions(list(memory.view(LAYERS, BLOCKS, 4 * HEADS, TOKENS, DIM)), BLOCKS)


def test_axes_of_size_one_do_not_matter() -> None:
    plain = _numbered(BLOCKS, TOKENS, DIM)
    odd = torch.as_strided(plain, (BLOCKS, 1, TOKENS, DIM), (TOKENS * DIM, 7777, DIM, 1))
    assert kv_regions([odd], BLOCKS) == kv_regions([plain], BLOCKS)


def test_a_cache_of_one_block_is_one_region() -> None:
    (region,) = kv_regions([_numbered(1, TOKENS, DIM)], 1)
    assert (region.num_blocks, region.block_bytes) == (1, TOKENS * DIM * 8)


def test_memory_behind_the_last_block_is_left_alone() -> None:
    memory = _numbered(BLOCKS * TOKENS * DIM + 5)
    (region,) = kv_regions([memory[: BLOCKS * TOKENS * DIM].view(BLOCKS, TOKENS, DIM)], BLOCKS)
    assert region.num_blocks * region.block_bytes == BLOCKS * TOKENS * DIM * 8


@pytest.mark.parametrize("blocks", [4, 7, 12])
def test_wrong_number_of_blocks_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"has not {blocks} blocks"):
        kv_regions([_numbered(BLOCKS, TOKENS, DIM)], blocks)


def test_blocks_inside_each_other_are_refused() -> None:
    """Heads outside of the blocks: no row has all of a block."""
    memory = _numbered(HEADS, BLOCKS, TOKENS, DIM)
    with pytest.raises(ValueError, match="in each other's way"):
        kv_regions([memory.permute(1, 0, 2, 3)], BLOCKS)


def test_rows_of_several_sizes_in_the_same_memory_are_refused() -> None:
    memory = _numbered(4 * BLOCKS * TOKENS * DIM)
    wide = memory[: 2 * BLOCKS * TOKENS * DIM].view(BLOCKS, 2 * TOKENS, DIM)
    narrow = memory[TOKENS * DIM :][: BLOCKS * TOKENS * DIM].view(BLOCKS, TOKENS, DIM)
    with pytest.raises(ValueError, match="interleaved"):
        kv_regions([wide, narrow], BLOCKS)
    with pytest.raises(ValueError, match="starts where another one does"):
        kv_regions([wide, memory[: BLOCKS * TOKENS * DIM].view(BLOCKS, TOKENS, DIM)], BLOCKS)
    with pytest.raises(ValueError, match="shares its blocks"):
        kv_regions([torch.as_strided(memory, (BLOCKS, DIM), (3 * TOKENS * DIM, 1), 7 * TOKENS * DIM)], BLOCKS)


def test_blocks_of_equal_size_may_have_another_order() -> None:
    """NHD and HND, as two GPUs of different kinds choose them: the same view of blocks with other strides."""
    memory = _numbered(BLOCKS, HEADS, TOKENS, DIM)
    other = _numbered(BLOCKS, TOKENS, HEADS, DIM).permute(0, 2, 1, 3)
    assert memory.shape == other.shape
    sizes = [[r.block_bytes for r in kv_regions([tensor], BLOCKS)] for tensor in (memory, other)]
    assert sizes[0] == sizes[1]
    assert block_order([memory], BLOCKS) != block_order([other], BLOCKS)


def test_the_order_of_a_block_does_not_depend_on_the_number_of_blocks() -> None:
    layers = [_numbered(BLOCKS, 2, TOKENS, DIM) for _ in range(3)]
    assert block_order(layers, BLOCKS) == block_order([_numbered(9, 2, TOKENS, DIM)], 9)


def test_the_data_type_and_kernel_blocks_belong_to_the_order_of_a_block() -> None:
    memory = _numbered(BLOCKS, HEADS, TOKENS, DIM)
    kernel_blocks = memory.view(BLOCKS * HEADS, 1, TOKENS, DIM)
    orders = {block_order([tensor], BLOCKS) for tensor in (memory, memory.view(torch.float64), kernel_blocks)}
    assert len(orders) == 3


def _divided(tensors: list[torch.Tensor], num_heads: int = HEADS) -> list[KvRegion]:
    regions = kv_regions(tensors, BLOCKS)
    return divided_by_heads(regions, tensors, BLOCKS, KvHeads(4, num_heads), total=8)


def test_heads_that_lie_one_after_the_other_divide_a_block() -> None:
    memory = _numbered(LAYERS, BLOCKS, HEADS, TOKENS, DIM)
    for region in _divided(list(memory)):
        assert (region.heads, region.parts, region.head_bytes) == (KvHeads(4, HEADS), 1, TOKENS * DIM * 8)


def test_a_block_has_its_heads_once_for_each_kernel_block() -> None:
    memory = _numbered(LAYERS, BLOCKS * 3, HEADS, TOKENS, DIM)
    assert {region.parts for region in _divided(list(memory))} == {3}
    # A rank with one of two heads has as many parts.
    assert {region.parts for region in _divided(list(memory[:, :, :1].contiguous()), 1)} == {3}


def test_a_block_has_its_heads_once_for_each_layer_inside_it() -> None:
    memory = _numbered(BLOCKS, LAYERS, HEADS, TOKENS, DIM)
    (region,) = _divided([memory[:, layer] for layer in range(LAYERS)])
    assert region.parts == LAYERS


def test_layers_of_several_groups_may_share_a_region() -> None:
    memory = _numbered(LAYERS, BLOCKS, HEADS, TOKENS, DIM)
    assert _divided([*memory, *memory]) == _divided(list(memory))


def test_the_only_head_is_a_whole_block_whatever_lies_in_it() -> None:
    """As latent vectors do, with gaps behind them, and others with indices beside them."""
    memory = _numbered(BLOCKS, 3 * TOKENS * DIM)
    tensors = [memory[:, : TOKENS * DIM].unflatten(1, (TOKENS, DIM)), memory[:, : 2 * DIM]]
    (region,) = divided_by_heads(kv_regions(tensors, BLOCKS), tensors, BLOCKS, KvHeads(0, 1), total=1)
    assert (region.heads, region.parts, region.head_bytes) == (KvHeads(0, 1), 1, 3 * TOKENS * DIM * 8)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([_numbered(BLOCKS, TOKENS, HEADS, DIM).permute(0, 2, 1, 3)], "not in one piece"),  # NHD
        (list(_numbered(BLOCKS, HEADS, LAYERS, TOKENS, DIM).permute(2, 0, 1, 3, 4)), "one after the other"),
        ([_numbered(BLOCKS, HEADS + 1, TOKENS, DIM)], "no axis of 2 heads"),
        ([_numbered(BLOCKS, HEADS * TOKENS)], "no axis of 2 heads"),
        ([_numbered(BLOCKS, 3 * HEADS * DIM)[:, : 2 * HEADS * DIM].unflatten(1, (HEADS, 2, DIM))], "gaps"),
        (
            [
                memory := _numbered(BLOCKS, HEADS, 6, DIM),
                memory.view(BLOCKS, HEADS * 6 * DIM).unflatten(1, (3, 4, DIM))[:, :HEADS],
            ],
            "one after the other",  # another group, whose pages are divided in another way
        ),
    ],
)
def test_other_layouts_are_not_divided_by_heads(tensors: list[torch.Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        _divided(tensors)


def test_the_order_of_a_head_does_not_depend_on_the_number_of_heads() -> None:
    orders = {
        block_order([_numbered(BLOCKS, number, TOKENS, DIM)], BLOCKS, of_a_head=True) for number in (1, 2, 4)
    }
    assert len(orders) == 1
