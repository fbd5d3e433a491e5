"""How KV blocks get from one instance's memory into another's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from migration.transport.quarantine import Quarantine


@dataclass(frozen=True, slots=True)
class KvHeads:
    """A range of KV heads, which are numbered over all ranks of an instance.

    Ranks divide the heads of each layer among them. Where there are more ranks than heads, several ranks have
    the same one. MLA has one head.

    Raises:
        ValueError: It is empty or begins below 0.
    """

    first: int
    number: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.number < 1:
            raise ValueError(f"not a range of heads: {self.number} from {self.first} on")

    @property
    def end(self) -> int:
        return self.first + self.number


@dataclass(frozen=True, slots=True)
class KvRegion:
    """A run of equally sized KV blocks in memory: one attention layer's cache, or its K or V half.

    Attributes:
        address: Address of block 0, in bytes.
        num_blocks: Blocks in the region. Block i starts at `address + i * block_bytes`.
        block_bytes: Size of one block; blocks touch each other.
        device_id: CUDA ordinal, or -1 for host memory.
        heads: What a block holds; None if it is not divided by heads, or not known.
        parts: A block is this many times all of `heads`, one head after the other: once for each kernel
            block, or for each layer inside the block.

    Raises:
        ValueError: A block cannot be divided so, or the numbers are no memory.
    """

    address: int
    num_blocks: int
    block_bytes: int
    device_id: int = -1
    heads: KvHeads | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        if min(self.address, self.num_blocks, self.block_bytes) < 0 or self.parts < 1:
            raise ValueError("a negative number describes no memory")
        if self.address + self.num_blocks * self.block_bytes >= 1 << 63:
            raise ValueError("memory ends behind the last address")
        if self.heads is not None and self.block_bytes % (self.heads.number * self.parts):
            raise ValueError(f"{self.block_bytes} bytes are not {self.parts} times {self.heads.number} heads")

    @property
    def head_bytes(self) -> int:
        """Of one head in one part; of a part if it is not divided by heads."""
        return self.block_bytes // self.parts // (self.heads.number if self.heads is not None else 1)


class KvTransport(Protocol):
    """Reads KV blocks of a peer into local blocks (one-sided: the peer's engine takes no part).

    One object per instance, with the memory of its KV cache. All regions of all instances of a model have the
    same order and count, and per head the same size; the protocol checks that before the first read.

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


class RankTransport(KvTransport, Protocol):
    """The `KvTransport` of one rank, which reads from one rank of a peer.

    Attributes:
        heads: What the blocks of all its regions hold; None if that is not known or differs.
    """

    @property
    def heads(self) -> KvHeads | None: ...

    async def read(
        self,
        peer: str,
        endpoint: bytes,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        heads: KvHeads | None = None,
    ) -> int:
        """As `KvTransport.read`; copies these heads of each block, or all of it."""
