"""Keys of the KV blocks in a simulated engine's prefix cache."""

from collections.abc import Callable, Iterator

from migration.cached_keys import ChangeRecord, KeyChanges, KeyFormat
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.contents import MASK, Prompt
from pd_serve.simulated_engine.settings import EngineSettings

#: Name of its way to make keys.
ALGORITHM = "simulated"


def key_format(settings: EngineSettings) -> KeyFormat | None:
    """None without a prefix cache."""
    if not settings.prefix_caching:
        return None
    return KeyFormat(ALGORITHM, settings.block_tokens, settings.block_tokens)


def next_hash(before: int, content: int) -> int:
    """The hash of a block, by that of the block before it (0 if there is none) and its content."""
    return hash((before, content))


def key_of(value: int) -> int:
    """The key of a block, by its hash."""
    return value & MASK


def prompt_keys(prompt: Prompt, block_tokens: int, num_tokens: int | None = None) -> Iterator[int]:
    """The keys of a prompt's full blocks, or of those in its first `num_tokens` tokens."""
    value = 0
    for block in range((prompt.num_tokens if num_tokens is None else num_tokens) // block_tokens):
        value = next_hash(value, prompt.content(block, block_tokens, block_tokens))
        yield key_of(value)


class SimulatedKeys:
    """Implements `migration.engine_interface.CachedKeySource`.

    Args:
        compute_ended: Computes what the steps that have ended add to the pool.
    """

    def __init__(self, pool: BlockPool, compute_ended: Callable[[], None] = lambda: None) -> None:
        self._pool = pool
        self._compute_ended = compute_ended

    async def take(self, most: int) -> KeyChanges | None:
        self._compute_ended()
        if (record := self._pool.record) is None:
            record = self._pool.record = ChangeRecord()
            record.restart(self._pool.hashes)
        if not record.changes and not record.is_new:
            return None
        gained, lost, anew = record.take(most)
        return KeyChanges(list(map(key_of, gained)), list(map(key_of, lost)), anew)
