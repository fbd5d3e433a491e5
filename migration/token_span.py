"""Where an output's tokens belong in their request, and whether they continue what was delivered."""

import struct
import zlib
from array import array
from collections.abc import Sequence

#: (ownership epoch, index of the first new token, `crc_of` the output tokens before it), one per output.
#:
#: Two copies of a request may continue it from the same token and sample different ones: a source that takes
#: it back, and the destination that had committed it. The CRC tells whose text an output continues.
TokenSpan = tuple[int, int, int]


_one_token = struct.Struct("q").pack


def crc_of(token_ids: Sequence[int], before: int = 0) -> int:
    """CRC-32 of output tokens, as 64-bit integers, which follow others of which it is `before`."""
    if len(token_ids) == 1:  # as in most steps: a third of the time of what follows
        return zlib.crc32(_one_token(token_ids[0]), before)
    return zlib.crc32(array("q", token_ids), before)
