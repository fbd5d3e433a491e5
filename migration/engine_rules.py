"""Rules of a live migration that every engine follows."""

from collections.abc import Sequence

from migration.messages import BlockRun

#: KV blocks reserved beyond those that a request has, so that it can decode on while it is being copied.
SLACK_BLOCKS = 2

#: A request is suspended when no more than this many blocks are left to copy.
TAIL_BLOCKS = 2


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """The number of blocks that hold these tokens, the last one perhaps partly filled."""
    return -(-num_tokens // block_tokens)


def should_suspend(
    num_computed_tokens: int, block_tokens: int, blocks_done: int, *, decoding: bool, suspend: bool
) -> bool:
    """Whether a running request is to be suspended at this step boundary, to copy what is left.

    Args:
        num_computed_tokens: Tokens whose KV is in blocks.
        blocks_done: Blocks that the destination has.
        decoding: The prompt is prefilled.
        suspend: Suspend a decoding request however much is left to copy.
    """
    left = blocks_for(num_computed_tokens, block_tokens) - blocks_done
    return decoding and (suspend or left <= TAIL_BLOCKS)


def next_stage(
    block_ids: Sequence[int], num_computed_tokens: int, block_tokens: int, blocks_done: int
) -> BlockRun | None:
    """The full blocks to copy next, which are never written again; None if there are none yet."""
    full = num_computed_tokens // block_tokens
    return BlockRun(blocks_done, list(block_ids[blocks_done:full])) if full > blocks_done else None


def tail(block_ids: Sequence[int], num_computed_tokens: int, block_tokens: int, blocks_done: int) -> BlockRun:
    """The blocks of a suspended, drained request that are left to copy."""
    end = blocks_for(num_computed_tokens, block_tokens)
    return BlockRun(blocks_done, list(block_ids[blocks_done:end]))


def mismatch(theirs: dict[str, str], ours: dict[str, str]) -> str | None:
    """The first property in which two engines differ, in words; None if requests can move between them."""
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            return f"{name} differs: {theirs.get(name)} there, {ours.get(name)} here"
    return None
