"""When a migrating request is staged, and when it is suspended."""

import pytest

from migration.engine_rules import TAIL_BLOCKS, blocks_for, mismatch, next_stage, should_suspend, tail
from migration.messages import BlockRun

BLOCK_TOKENS = 4
BLOCKS = [10, 11, 12, 13, 14]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_the_last_block_may_be_partly_filled(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, BLOCK_TOKENS) == blocks


def test_only_full_blocks_beyond_those_copied_are_staged() -> None:
    assert next_stage(BLOCKS, 14, BLOCK_TOKENS, 1) == BlockRun(1, [11, 12])
    assert next_stage(BLOCKS, 14, BLOCK_TOKENS, 3) is None


def test_a_tail_has_the_partly_filled_block() -> None:
    assert tail(BLOCKS, 14, BLOCK_TOKENS, 2) == BlockRun(2, [12, 13])


def test_a_decoding_request_is_suspended_when_only_a_tail_is_left() -> None:
    tokens = 4 * BLOCK_TOKENS

    def suspends(blocks_done: int, *, decoding: bool = True, suspend: bool = False) -> bool:
        return should_suspend(tokens, BLOCK_TOKENS, blocks_done, decoding=decoding, suspend=suspend)

    assert suspends(4 - TAIL_BLOCKS)
    assert not suspends(4 - TAIL_BLOCKS - 1)
    assert suspends(0, suspend=True)
    assert not suspends(4, decoding=False, suspend=True)


def test_the_first_difference_of_two_engines_is_named() -> None:
    ours = {"model": "tiny", "block size": "16"}

    assert mismatch(ours, ours) is None
    assert mismatch(ours | {"block size": "32"}, ours) == "block size differs: 32 there, 16 here"
    assert mismatch({"model": "tiny"}, ours) == "block size differs: None there, 16 here"
    assert mismatch(ours | {"attention": "flash"}, ours) == "attention differs: flash there, None here"
