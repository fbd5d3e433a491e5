"""How KV blocks get from one instance's memory into another's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from migration.transport.quarantine import Quarantine


@dataclass(frozen=True, slots=True)
class KvRegion:
    """A run of equally sized KV blocks in memory: one attention layer's cache, or its K or V half.

    Attributes:
        address: Address of block 0, in bytes.
        num_blocks: Blocks in the region. Block i starts at `address + i * block_bytes`.
        block_bytes: Size of one block; blocks touch each other.
        device_id: CUDA ordinal, or -1 for host memory.
    """

    address: int
    num_blocks: int
    block_bytes: int
    device_id: int = -1


class KvTransport(Protocol):
    """Reads KV blocks of a peer into local blocks (one-sided: the peer's engine takes no part).

    One object per instance, with the memory of its KV cache. All regions of all instances of a model have the
    same order, count and block size; the protocol checks that before the first read.

    Attributes:
        quarantine: Local blocks that a read which has raised may still write to. They are not to be freed
            before they have left it.
    """

    quarantine: Quarantine

    def endpoint(self) -> bytes:
        """What a peer has to know to read from here. Opaque, sent over the authenticated control channel."""

    async def read(
        self, peer: str, endpoint: bytes, remote_blocks: Sequence[int], local_blocks: Sequence[int]
    ) -> int:
        """Copies the peer's `remote_blocks[i]` over the local `local_blocks[i]`, in every region.

        May be called several times at once. When it returns, nothing is writing to the local blocks any more.
        When it raises, some of them may be in `quarantine`; a cancelled call first waits for a moment, in
        which most reads end.

        Args:
            peer: The peer's instance id; connections are kept per peer.
            endpoint: The peer's `endpoint()`.

        Returns:
            Bytes copied.

        Raises:
            PeerLostError: The peer died, or the transfer failed or took longer than the transport's bound.
        """

    def forget(self, peer: str) -> None:
        """Drops the connection to a peer that is gone. Unknown peers are ignored."""

    def close(self) -> None:
        """Frees everything, shared memory included. Idempotent."""
