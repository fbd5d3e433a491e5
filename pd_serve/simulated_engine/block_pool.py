"""Paged KV memory of a simulated engine: blocks with contents, reference counts and a prefix cache."""

from array import array
from collections.abc import Collection, Sequence

from migration.cached_keys import ChangeRecord
from pd_serve.simulated_engine.contents import GARBAGE


class BlockPool:
    """Blocks are free, held by one or more requests, or evictable: unused but still found by their hash.

    Attributes:
        content: One 64-bit number per block, in memory of its own that a transport can copy.
        record: Hashes that the prefix cache gains and loses; None as long as no one asks.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.content = array("Q", [GARBAGE]) * num_blocks
        self.record: ChangeRecord[int] | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._block_by_hash: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self._evictable: dict[int, None] = {}  # in the order in which they became unused

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._evictable)

    def num_references(self, block: int) -> int:
        """How many requests hold a block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Takes blocks out of the pool; the caller has checked `num_free`. They hold garbage."""
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._evictable))
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one reference to each. The last ones of a sequence are evicted first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._evictable[block] = None
            else:
                self.content[block] = GARBAGE
                self._free.append(block)

    def cached(self, hashes: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning of what these hashes stand for."""
        found = []
        for value in hashes:
            block = self._block_by_hash.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Takes another reference to blocks found by `cached`."""
        for block in blocks:
            self._references[block] += 1
            self._evictable.pop(block, None)

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of these would leave the free ones if they were shared."""
        return sum(block in self._evictable for block in blocks)

    def publish(self, block: int, value: int) -> None:
        """Makes a full block findable, unless another one with the same content is."""
        if value not in self._block_by_hash and block not in self._hash_of:
            self._block_by_hash[value] = block
            self._hash_of[block] = value
            if self.record is not None:
                self.record.gained(value)

    @property
    def hashes(self) -> Collection[int]:
        """What the prefix cache has."""
        return self._block_by_hash.keys()

    def empty_cache(self) -> bool:
        """Empties the prefix cache. As in vLLM, only if no request holds a block; returns whether it did."""
        if self.num_free != self.num_blocks:
            return False
        while self._evictable:
            block = next(iter(self._evictable))
            self._forget(block)
            self._free.append(block)
        return True

    def check_integrity(self, held: Sequence[int]) -> list[str]:
        """What does not add up if requests hold `held`, each block once per holder."""
        problems = []
        references = [0] * self.num_blocks
        for block in held:
            references[block] += 1
        if references != self._references:
            wrong = [b for b in range(self.num_blocks) if references[b] != self._references[b]]
            problems.append(f"references of blocks {wrong[:10]} are not those of their holders")
        unused = sorted([*self._free, *self._evictable])
        if unused != [block for block in range(self.num_blocks) if not references[block]]:
            problems.append("blocks are lost, or free and held at once")
        return problems

    def _forget(self, block: int) -> None:
        del self._evictable[block]
        value = self._hash_of.pop(block)
        del self._block_by_hash[value]
        if self.record is not None:
            self.record.lost(value)
        self.content[block] = GARBAGE
