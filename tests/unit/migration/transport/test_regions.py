"""`kv_regions` on the layouts attention backends use."""

import pytest
import torch

from migration.transport.regions import block_order, kv_regions

BLOCKS, HEADS, TOKENS, DIM = 6, 2, 4, 8


def _numbered(*shape: int) -> torch.Tensor:
    """A cache in which each element knows its place."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(count, dtype=torch.int64).reshape(shape)


def test_blocks_first_is_one_region_a_layer() -> None:
    layers = [torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16) for _ in range(3)]
    regions = kv_regions(layers, BLOCKS, 0)
    assert [r.address for r in regions] == [layer.data_ptr() for layer in layers]
    assert {(r.num_blocks, r.block_bytes, r.device_id) for r in regions} == {
        (BLOCKS, HEADS * TOKENS * 2 * DIM * 2, -1)
    }


def test_key_and_value_apart_are_two_regions() -> None:
    cache = _numbered(2, BLOCKS, TOKENS, HEADS, DIM)
    keys, values = kv_regions([cache], BLOCKS, 1)
    assert keys.address == cache[0].data_ptr()
    assert values.address == cache[1].data_ptr()
    assert keys.block_bytes == cache[0, 0].numel() * 8
    # Block i is where the region says.
    assert keys.address + 3 * keys.block_bytes == cache[0, 3].data_ptr()


def test_axes_before_the_blocks_are_all_enumerated() -> None:
    cache = _numbered(2, 3, BLOCKS, DIM)
    regions = kv_regions([cache], BLOCKS, 2)
    assert [r.address for r in regions] == [cache[i, j].data_ptr() for i in range(2) for j in range(3)]


def test_view_with_the_key_value_axis_first_is_still_one_region() -> None:
    """FlashInfer keeps K and V of a block together; seen through a transposed view that is one region."""
    memory = _numbered(BLOCKS, 2, TOKENS, HEADS, DIM)
    assert kv_regions([memory.transpose(0, 1)], BLOCKS, 1) == kv_regions([memory], BLOCKS, 0)


def test_axes_inside_a_block_may_be_permuted() -> None:
    memory = _numbered(BLOCKS, HEADS, TOKENS, DIM)
    assert kv_regions([memory.permute(0, 2, 1, 3)], BLOCKS, 0) == kv_regions([memory], BLOCKS, 0)


def test_axis_after_the_blocks_that_lies_outside_gives_regions() -> None:
    memory = _numbered(HEADS, BLOCKS, TOKENS, DIM)
    view = memory.permute(1, 0, 2, 3)
    assert kv_regions([view], BLOCKS, 0) == kv_regions([memory], BLOCKS, 1)


def test_axes_of_size_one_do_not_matter() -> None:
    plain = _numbered(BLOCKS, TOKENS, DIM)
    odd = torch.as_strided(plain, (BLOCKS, 1, TOKENS, DIM), (TOKENS * DIM, 7, DIM, 1))
    assert kv_regions([odd], BLOCKS, 0) == kv_regions([plain], BLOCKS, 0)


def test_a_cache_of_one_block_is_one_region() -> None:
    (region,) = kv_regions([_numbered(1, TOKENS, DIM)], 1, 0)
    assert (region.num_blocks, region.block_bytes) == (1, TOKENS * DIM * 8)


def test_layers_that_share_memory_are_one_region() -> None:
    layer = _numbered(BLOCKS, TOKENS, DIM)
    assert kv_regions([layer, layer.view(BLOCKS, TOKENS * DIM)], BLOCKS, 0) == kv_regions([layer], BLOCKS, 0)


def test_default_axis_is_the_first_of_that_size() -> None:
    split, plain = _numbered(2, BLOCKS, DIM), _numbered(BLOCKS, DIM)
    assert kv_regions([split, plain], BLOCKS) == kv_regions([split], BLOCKS, 1) + kv_regions(
        [plain], BLOCKS, 0
    )


def test_blocks_apart_are_refused() -> None:
    """Layers interleaved block by block: a layer's blocks do not touch."""
    memory = _numbered(BLOCKS, 3, TOKENS, DIM)
    with pytest.raises(ValueError, match="must be contiguous and touch"):
        kv_regions([memory[:, 1]], BLOCKS, 0)


def test_gap_inside_a_block_is_refused() -> None:
    memory = _numbered(BLOCKS, TOKENS, 2 * DIM)
    with pytest.raises(ValueError, match="gaps inside a block"):
        kv_regions([memory[:, :, ::2]], BLOCKS, 0)
    with pytest.raises(ValueError, match="gaps inside a block"):
        kv_regions([memory[:, :, :DIM]], BLOCKS, 0)


@pytest.mark.parametrize("axis", [1, 5, None])
def test_wrong_number_of_blocks_is_refused(axis: int | None) -> None:
    with pytest.raises(ValueError, match="has not 7 blocks"):
        kv_regions([_numbered(BLOCKS, TOKENS, DIM)], 7, axis)


def test_shared_start_with_another_block_size_is_refused() -> None:
    memory = _numbered(BLOCKS, 2, DIM)
    with pytest.raises(ValueError, match="starts where another one does"):
        kv_regions([memory, memory.view(-1)[: BLOCKS * DIM].view(BLOCKS, DIM)], BLOCKS, 0)


def test_blocks_of_equal_size_may_have_another_order() -> None:
    """NHD and HND, as two GPUs of different kinds choose them: the same view of blocks with other strides."""
    memory = _numbered(BLOCKS, HEADS, TOKENS, DIM)
    other = _numbered(BLOCKS, TOKENS, HEADS, DIM).permute(0, 2, 1, 3)
    assert memory.shape == other.shape
    sizes = [[r.block_bytes for r in kv_regions([tensor], BLOCKS)] for tensor in (memory, other)]
    assert sizes[0] == sizes[1]
    assert block_order([memory], BLOCKS) != block_order([other], BLOCKS)


@pytest.mark.parametrize("shape", [(BLOCKS, 2, TOKENS, DIM), (2, BLOCKS, TOKENS, HEADS, DIM)])
def test_the_order_of_a_block_does_not_depend_on_the_number_of_blocks(shape: tuple[int, ...]) -> None:
    more = tuple(9 if size == BLOCKS else size for size in shape)
    layers = [_numbered(*shape) for _ in range(3)]
    assert block_order(layers, BLOCKS) == block_order([_numbered(*more)], 9)


def test_the_data_type_and_the_axes_outside_belong_to_the_order_of_a_block() -> None:
    memory = _numbered(BLOCKS, HEADS, TOKENS, DIM)
    outside = _numbered(HEADS, BLOCKS, TOKENS, DIM).permute(1, 0, 2, 3)
    orders = {block_order([tensor], BLOCKS) for tensor in (memory, memory.view(torch.float64), outside)}
    assert len(orders) == 3
