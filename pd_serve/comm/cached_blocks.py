"""Messages about the KV blocks in the prefix caches of instances."""

import struct
from collections.abc import Sequence

import msgspec


class FollowCachedBlocks(msgspec.Struct, frozen=True, tag=True):
    """API server → instance: report all blocks in the prefix cache, and every change from now on."""


def packed(keys: Sequence[int]) -> bytes:
    """Keys as they travel: 8 bytes each."""
    return struct.pack(f"<{len(keys)}Q", *keys)


def unpacked(keys: bytes) -> tuple[int, ...]:
    """The keys of `packed`. Raises: struct.error: it is not of whole keys."""
    return struct.unpack(f"<{len(keys) // 8}Q", keys)


class CachedBlocks(msgspec.Struct, frozen=True, tag=True):
    """Instance → API servers that follow: keys of blocks that its prefix cache has gained and lost.

    Attributes:
        address: Of the instance: another one may have had its name.
        number: Of this report, from 1 on, the same for all API servers.
        gained, lost: See `packed` and `migration.cached_keys`.
        anew: The receiver forgets what it knows before.
    """

    address: str
    number: int
    gained: bytes
    lost: bytes
    anew: bool = False
