"""Which KV heads a rank has, by vLLM's own kinds of cache; and when a block cannot be divided."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from migration.transport.kv_transport import KvHeads
from migration.vllm_engine.head_division import heads_of_rank

pytestmark = pytest.mark.integration

SHAPE: dict[str, Any] = {"block_size": 32, "head_size": 64, "dtype": torch.float32}
STATE = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))


def full(heads: int, **more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(num_kv_heads=heads, **SHAPE | more)


def config(total: int, ranks: int, draft: int | None = None, **degrees: int) -> Any:
    parallel = dict.fromkeys(
        ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"], 1
    )
    model, drafter = (SimpleNamespace(get_total_num_kv_heads=lambda n=n: n) for n in (total, draft))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | {"tensor_parallel_size": ranks} | degrees),
        model_config=model,
        speculative_config=None if draft is None else SimpleNamespace(draft_model_config=drafter),
    )


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 4, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_are_shared_or_repeated(total: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    specs = [
        full(expected[0][1]),
        SlidingWindowSpec(num_kv_heads=expected[0][1], sliding_window=64, **SHAPE),
    ]
    for rank, (first, number) in enumerate(expected):
        assert heads_of_rank(config(total, ranks), specs, rank) == (KvHeads(first, number), total)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_rank_has_the_latent_vectors_of_mla(ranks: int) -> None:
    latent = MLAAttentionSpec(num_kv_heads=1, **SHAPE)
    for rank in range(ranks):
        assert heads_of_rank(config(4, ranks), [latent], rank) == (KvHeads(0, 1), 1)


@pytest.mark.parametrize(
    ("vllm_config", "specs", "why"),
    [
        (config(4, 2), [full(2), STATE], "linear attention"),
        (config(4, 1), [STATE], "linear attention"),
        (config(4, 2), [full(2), KVCacheSpec(block_size=32)], "kind KVCacheSpec"),
        (config(4, 2), [full(2), full(1)], "not all layers"),
        (config(4, 2), [full(4)], "not all layers"),
        (config(4, 2), [full(2, num_head_slots=1)], "not all layers"),
        (config(4, 2), [full(2), MLAAttentionSpec(num_kv_heads=1, **SHAPE)], "not all layers"),
        (config(4, 4, draft=2), [full(1)], "not all layers"),
        (config(4, 2, pipeline_parallel_size=2), [full(2)], "pipeline stages"),
        (config(4, 2, decode_context_parallel_size=2), [full(2)], "tokens of a block"),
    ],
)
def test_blocks_that_are_not_divided_by_heads_have_a_reason(
    vllm_config: Any, specs: list[KVCacheSpec], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        heads_of_rank(vllm_config, specs, 0)


def test_a_drafter_with_as_many_heads_is_divided_with_the_model() -> None:
    assert heads_of_rank(config(4, 2, draft=4), [full(2), full(2)], 1) == (KvHeads(2, 2), 4)
