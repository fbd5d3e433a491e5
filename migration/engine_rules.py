"""Rules of a live migration that every engine follows."""

from collections.abc import Sequence
from typing import NamedTuple

from migration.messages import BlockRun, KvPart

#: KV blocks reserved beyond those that a request has, so that it can decode on while it is being copied; and
#: the most tokens that they are for, as engines with linear attention have blocks of hundreds of tokens.
SLACK_BLOCKS, SLACK_TOKENS = 2, 64


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """The number of blocks that hold these tokens, the last one perhaps partly filled."""
    return -(-num_tokens // block_tokens)


def slack_tokens(block_tokens: int) -> int:
    """Tokens beyond those that a request has for which a destination reserves blocks."""
    return min(SLACK_BLOCKS * block_tokens, SLACK_TOKENS)


def should_suspend(
    num_computed_tokens: int, stage_tokens: int, tokens_done: int, *, decoding: bool, suspend: bool
) -> bool:
    """Whether a running request is to be suspended at this step boundary, to copy what is left.

    Args:
        num_computed_tokens: Tokens whose KV is in blocks.
        stage_tokens: Tokens of a block, or the least common multiple of several cache groups' block sizes.
        tokens_done: Tokens whose KV the destination has.
        decoding: The prompt is prefilled.
        suspend: Suspend a decoding request however much is left to copy.
    """
    return decoding and (suspend or num_computed_tokens - tokens_done < stage_tokens)


class BlockTable(NamedTuple):
    """The blocks of a request in one cache group, by block index."""

    block_tokens: int
    block_ids: Sequence[int]


def next_stage(
    tables: Sequence[BlockTable], num_computed_tokens: int, stage_tokens: int, tokens_done: int
) -> KvPart | None:
    """The full blocks to copy next, which are never written again; None if there are none yet."""
    end = num_computed_tokens // stage_tokens * stage_tokens
    return _part(tables, tokens_done, end) if end > tokens_done else None


def tail(
    tables: Sequence[BlockTable], num_computed_tokens: int, tokens_done: int, states: Sequence[int] = ()
) -> KvPart:
    """What is left to copy of a suspended, drained request; `states` are the blocks with its state."""
    part = _part(tables, tokens_done, num_computed_tokens)
    return KvPart(part.end, part.runs, list(states))


def _part(tables: Sequence[BlockTable], begin: int, end: int) -> KvPart:
    runs = []
    for block_tokens, block_ids in tables:
        first = begin // block_tokens
        runs.append(BlockRun(first, list(block_ids[first : blocks_for(end, block_tokens)])))
    return KvPart(end, runs)


def mismatch(theirs: dict[str, str], ours: dict[str, str]) -> str | None:
    """The first property in which two engines differ, in words; None if requests can move between them."""
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            return f"{name} differs: {theirs.get(name)} there, {ours.get(name)} here"
    return None
