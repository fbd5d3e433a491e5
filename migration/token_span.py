"""Where an output's tokens belong in their request, and whether they continue what was delivered."""

import zlib
from array import array
from collections.abc import Iterable

#: (ownership epoch, index of the first new token, `crc_of` the output tokens before it), one per output.
#:
#: Two copies of a request may continue it from the same token and sample different ones: a source that takes
#: it back, and the destination that had committed it. The CRC tells whose text an output continues.
TokenSpan = tuple[int, int, int]


def crc_of(token_ids: Iterable[int], before: int = 0) -> int:
    """CRC-32 of output tokens, as 64-bit integers, which follow others of which it is `before`."""
    return zlib.crc32(array("q", token_ids), before)
