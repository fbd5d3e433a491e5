"""When a migrating request is staged, and when it is suspended."""

import pytest

from migration.engine_rules import (
    SLACK_TOKENS,
    BlockTable,
    blocks_for,
    mismatch,
    next_stage,
    should_suspend,
    slack_tokens,
    tail,
)
from migration.messages import NO_BLOCK, BlockRun, KvPart

BLOCK_TOKENS = 4
ONE = [BlockTable(BLOCK_TOKENS, [10, 11, 12, 13, 14])]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_the_last_block_may_be_partly_filled(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, BLOCK_TOKENS) == blocks


def test_only_full_blocks_beyond_those_copied_are_staged() -> None:
    assert next_stage(ONE, 14, BLOCK_TOKENS, 4) == KvPart(12, [BlockRun(1, [11, 12])])
    assert next_stage(ONE, 14, BLOCK_TOKENS, 12) is None


def test_a_tail_has_the_partly_filled_block() -> None:
    assert tail(ONE, 14, 8) == KvPart(14, [BlockRun(2, [12, 13])])
    assert tail(ONE, 12, 12) == KvPart(12, [BlockRun(3, [])])


def test_a_stage_ends_where_blocks_of_all_cache_groups_do() -> None:
    tables = [BlockTable(4, [1, 2, 3, 4, 5, 6]), BlockTable(8, [7, 8, 9]), BlockTable(8, [])]
    part = next_stage(tables, 22, 8, 0)
    assert part == KvPart(16, [BlockRun(0, [1, 2, 3, 4]), BlockRun(0, [7, 8]), BlockRun(0, [])])
    assert next_stage(tables, 23, 8, 16) is None
    last = tail(tables, 22, 16, [30])
    assert last == KvPart(22, [BlockRun(4, [5, 6]), BlockRun(2, [9]), BlockRun(2, [])], [30])
    assert last.block_ids == [5, 6, 9, 30]


def test_what_is_behind_a_window_is_not_read() -> None:
    part = next_stage([BlockTable(4, [NO_BLOCK, NO_BLOCK, 5, 6])], 16, 4, 0)
    assert part == KvPart(16, [BlockRun(0, [NO_BLOCK, NO_BLOCK, 5, 6])])
    assert part.block_ids == [5, 6]


def test_a_decoding_request_is_suspended_when_no_full_block_is_left() -> None:
    tokens = 4 * BLOCK_TOKENS + 1

    def suspends(tokens_done: int, *, decoding: bool = True, suspend: bool = False) -> bool:
        return should_suspend(tokens, BLOCK_TOKENS, tokens_done, decoding=decoding, suspend=suspend)

    assert suspends(4 * BLOCK_TOKENS)
    assert not suspends(3 * BLOCK_TOKENS)
    assert suspends(0, suspend=True)
    assert not suspends(4 * BLOCK_TOKENS, decoding=False, suspend=True)


def test_slack_is_two_blocks_unless_blocks_are_large() -> None:
    assert [slack_tokens(size) for size in (16, 32, 544)] == [32, 64, SLACK_TOKENS]


def test_the_first_difference_of_two_engines_is_named() -> None:
    ours = {"model": "tiny", "block size": "16"}

    assert mismatch(ours, ours) is None
    assert mismatch(ours | {"block size": "32"}, ours) == "block size differs: 32 there, 16 here"
    assert mismatch({"model": "tiny"}, ours) == "block size differs: None there, 16 here"
    assert mismatch(ours | {"attention": "flash"}, ours) == "attention differs: flash there, None here"
