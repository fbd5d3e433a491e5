"""What all migrations of one instance share."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from migration.bounds import MigrationBounds
from migration.engine_interface import Engine
from migration.messages import InstanceId, MigrationMessage
from migration.prefix_messages import PrefixMessage
from migration.tasks import BackgroundTasks
from migration.transport.kv_transport import KvTransport

#: Weight of earlier reads, at each new one.
_DECAY = 0.9


class Pacer:
    """Bounds the rate at which one instance copies while the requests it copies go on.

    On a CPU, copies and engine steps share the memory's bandwidth: unpaced, a copy slowed the source's
    steps by 12 % (measured at 4,096 tokens, two cores). Copies over a network or between GPUs need none.

    Args:
        bytes_per_s: Rate over all copies together; None for no bound.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    @property
    def paces(self) -> bool:
        return self._bytes_per_s is not None

    async def copied(self, num_bytes: int) -> None:
        """Waits until the copied bytes are within the rate."""
        if self._bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)


class ReadTimes:
    """How long the latest copies to an instance took.

    Attributes:
        block_s: Time for each block, in seconds; 0 until there was a copy.
    """

    def __init__(self) -> None:
        self.block_s = 0.0
        self._seconds = self._blocks = 0.0

    def add(self, seconds: float, num_blocks: int) -> None:
        self._seconds = _DECAY * self._seconds + seconds
        self._blocks = _DECAY * self._blocks + num_blocks
        self.block_s = self._seconds / self._blocks


@dataclass(frozen=True, slots=True)
class LocalInstance:
    """The instance that migrations leave or come to.

    Attributes:
        send: Sends a message to a peer; must not block, and may lose the message.
        tasks: Run until they end or the instance stops.
        is_far: Whether a peer runs on another machine.
        reads, far_reads: Times of the copies from peers on this machine, and on others.
    """

    name: InstanceId
    engine: Engine
    transport: KvTransport
    send: Callable[[InstanceId, MigrationMessage | PrefixMessage], None]
    bounds: MigrationBounds
    pacer: Pacer
    tasks: BackgroundTasks
    is_far: Callable[[InstanceId], bool] = lambda peer: False
    reads: ReadTimes = field(default_factory=ReadTimes)
    far_reads: ReadTimes = field(default_factory=ReadTimes)

    async def read(
        self, peer: InstanceId, endpoint: bytes, remote_blocks: Sequence[int], local_blocks: Sequence[int]
    ) -> int:
        """See `KvTransport.read`."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        num_bytes = await self.transport.read(peer, endpoint, remote_blocks, local_blocks)
        reads = self.far_reads if self.is_far(peer) else self.reads
        reads.add(loop.time() - began_at, max(len(local_blocks), 1))
        return num_bytes
