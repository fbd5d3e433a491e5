"""Calls by name."""

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.utilities import call_utility


def test_the_prefix_cache_is_emptied_unless_a_request_holds_a_block() -> None:
    pool = BlockPool(4)
    [block] = pool.allocate(1)
    pool.publish(block, 7)
    assert call_utility(pool, "reset_prefix_cache") is False
    pool.release([block])
    assert call_utility(pool, "reset_prefix_cache") is True

    assert not pool.hashes
    assert pool.num_free == 4
    assert pool.check_integrity([]) == []


def test_other_calls_are_answered_or_refused() -> None:
    assert call_utility(BlockPool(1), "is_sleeping") is False
    with pytest.raises(InvalidRequestError, match="fly is not a utility"):
        call_utility(BlockPool(1), "fly")
