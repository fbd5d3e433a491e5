"""Keys of the KV blocks in a prefix cache, and how they change.

The key of a block is a number of 64 bits that follows from all tokens up to the block's end. The keys of a
prompt that an engine has from the first one on are those of the prefix that it need not compute.
"""

from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

#: Bytes of a vLLM block hash that are a key. A key is a hint: readers of blocks compare whole hashes.
KEY_BYTES = 8


def key_of(block_hash: bytes) -> int:
    """The key of a block, by vLLM's hash of it."""
    return int.from_bytes(block_hash[:KEY_BYTES], "big")


class KeyFormat(NamedTuple):
    """How keys follow from tokens. Engines of the same format have the same keys.

    Attributes:
        algorithm: Of the hash: vLLM's name, or "simulated".
        hash_tokens: Tokens per hash. Each hash has the one before it in it.
        key_tokens: Tokens per key, a multiple of that: a key is the hash at its last token.
        root: Stands for the hash before the first one, in hexadecimal digits.
    """

    algorithm: str
    hash_tokens: int
    key_tokens: int
    root: str = ""


class KeyChanges(NamedTuple):
    """What a prefix cache has gained and lost.

    Attributes:
        anew: It has nothing else: it was emptied before, or this is the first look at it.
    """

    gained: list[int]
    lost: list[int]
    anew: bool = False


class ChangeRecord(Generic[K]):
    """Changes of a set of keys since they were last taken. What was gained and lost again is none.

    So there are never more changes than keys now and keys at the last look.
    """

    def __init__(self) -> None:
        self.changes: dict[K, bool] = {}  # whether it was gained
        self.is_new = True

    def __len__(self) -> int:
        return len(self.changes)

    def restart(self, keys: Iterable[K]) -> None:
        """The set has these keys now, whatever it had before."""
        self.changes = dict.fromkeys(keys, True)
        self.is_new = True

    def gained(self, key: K) -> None:
        """A key that was not in the set."""
        if self.changes.pop(key, None) is None:
            self.changes[key] = True

    def lost(self, key: K) -> None:
        """A key that was in the set."""
        if self.changes.pop(key, None) is None:
            self.changes[key] = False

    def take(self, most: int) -> tuple[list[K], list[K], bool]:
        """Takes up to `most` changes: keys gained, keys lost, and whether the set was restarted before."""
        taken = self.changes
        if len(taken) > most:
            taken = dict(islice(taken.items(), most))
            for key in taken:
                del self.changes[key]
        else:
            self.changes = {}
        is_new, self.is_new = self.is_new, False
        gained = [key for key, is_gain in taken.items() if is_gain]
        return gained, [key for key, is_gain in taken.items() if not is_gain], is_new
