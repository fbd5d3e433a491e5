"""Where the prefix of a prompt is copied from, if that is sooner than computing it."""

from collections.abc import Sequence
from typing import NamedTuple

from router.load import InstanceLoad

#: Messages and calls of a copy, in seconds.
COPY_LATENCY_S = 0.005

#: Fewer tokens are not worth a copy.
MIN_TOKENS = 64


class PrefixSource(NamedTuple):
    """An instance that has a longer prefix of a prompt than the one that is to compute it.

    Attributes:
        tokens: What it has, and the other one lacks.
        seconds: Time to copy that.
    """

    holder: str
    tokens: int
    seconds: float


def prefix_source(holders: Sequence[InstanceLoad], reader: InstanceLoad) -> PrefixSource | None:
    """The instance to copy the prefix of a prompt from; None if computing it is sooner.

    Times are measured: of prompt tokens and copies at the reader, and of steps at the holder. As long as the
    reader has copied nothing, its copies count as fast, so that they get measured.

    Args:
        holders: Loads of the instances that may have it, with `cached_tokens` for this prompt.
        reader: Load of the instance that is to compute the prompt, with the same.
    """
    holder = max(holders, key=lambda load: (load.cached_tokens, load.instance_id), default=reader)
    tokens = holder.cached_tokens - reader.cached_tokens
    if holder.instance_id == reader.instance_id or tokens < MIN_TOKENS:
        return None
    wait_s = COPY_LATENCY_S + holder.decode_step_s / 2  # for the end of the holder's step
    seconds = wait_s + reader.blocks_for(tokens) * reader.block_copy_s
    if seconds >= tokens * reader.prompt_token_s:
        return None
    return PrefixSource(holder.instance_id, tokens, seconds)
