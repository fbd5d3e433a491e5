"""Where the prefix of a prompt is copied from, if that is sooner than computing it."""

from collections.abc import Callable, Sequence
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


def prefix_source(
    holders: Sequence[InstanceLoad],
    reader: InstanceLoad,
    are_apart: Callable[[str, str], bool] = lambda one, other: False,
) -> PrefixSource | None:
    """The instance whose prefix of a prompt saves the reader most time; None if none saves any.

    Times are measured: of prompt tokens and copies at the reader, and of steps at the holder. As long as the
    reader has copied nothing over such a distance, its copies count as fast, so that they get measured.

    Args:
        holders: Loads of the instances that may have it, with `cached_tokens` for this prompt.
        reader: Load of the instance that is to compute the prompt, with the same.
        are_apart: Whether two instances are on different machines.
    """
    best, most_saved_s = None, 0.0
    for holder in sorted(holders, key=lambda load: (-load.cached_tokens, load.instance_id)):
        tokens = holder.cached_tokens - reader.cached_tokens
        if tokens < MIN_TOKENS or tokens * reader.prompt_token_s <= most_saved_s:
            break  # nor do those behind it save more
        if holder.instance_id == reader.instance_id:
            continue
        wait_s = COPY_LATENCY_S + holder.decode_step_s / 2  # for the end of the holder's step
        is_far = are_apart(holder.instance_id, reader.instance_id)
        seconds = wait_s + reader.copy_time_s(reader.blocks_for(tokens), is_far=is_far)
        if (saved_s := tokens * reader.prompt_token_s - seconds) > most_saved_s:
            best, most_saved_s = PrefixSource(holder.instance_id, tokens, seconds), saved_s
    return best
