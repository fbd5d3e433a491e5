"""The interface between prefix copies and an engine's prefix cache."""

from dataclasses import dataclass
from typing import Any, Protocol

from migration.messages import KvPart, MigrationId
from migration.reservation import Reservation


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """The prefix of a prompt, as another engine can look it up.

    Attributes:
        hashes: See `PrefixAsk`; empty if the request can use no cached prefix.
        max_tokens: The most tokens that the request can take from a cache: not its last one.
        compatibility: What has to be equal in two engines that exchange blocks, by name.
        prompt: The request as its own engine has decoded it, for `PrefixStore.reserve`; None elsewhere.
    """

    hashes: list[bytes]
    max_tokens: int
    compatibility: dict[str, str]
    prompt: Any = None


class PrefixStore(Protocol):
    """An engine's prefix cache, as far as other engines read it and fill it.

    Implemented by `migration.vllm_engine.prefix_store.VllmPrefixStore` and by
    `pd_serve.simulated_engine.prefix_store.SimulatedPrefixStore`.
    """

    def query(self, payload: list[bytes]) -> PrefixQuery:
        """Reads a request's prefix. Raises: whatever the engine raises for a request that it cannot read."""

    async def offer(self, copy_id: MigrationId, query: PrefixQuery) -> KvPart:
        """The longest cached prefix, with a run for every cache group; `end` is 0 if there is none.

        Its blocks are pinned until `Engine.unpin` is called with this id. All of them have been computed.

        Raises:
            DestinationRefusedError: the engines differ, or this one cannot share blocks; nothing is pinned.
        """

    async def reserve(self, copy_id: MigrationId, query: PrefixQuery, part: KvPart) -> Reservation:
        """Holds blocks for what is offered to this engine's own query and not here already.

        Returns: its tables have `NO_BLOCK` where nothing is to be copied. They are empty if all is here
            already, and nothing is held.

        Raises:
            DestinationRefusedError: no room, or the offer does not fit this engine; nothing is held.
        """

    async def publish(self, copy_id: MigrationId) -> None:
        """The reserved blocks hold what was offered: they enter the prefix cache, unused. Idempotent."""

    async def drop(self, copy_id: MigrationId) -> None:
        """Frees the reserved blocks. Idempotent."""
