"""KV cache memory for `bench links`: its layouts, and a process that owns what another one reads."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import numpy.typing as npt

from migration.transport.kv_transport import KvRegion
from migration.transport.nixl import NixlTransport
from migration.transport.nixl_agent import NixlAgent
from pd_serve.errors import PdServeError

#: Time for the owner to start or end, in seconds.
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The KV cache of a model.

    Attributes:
        regions: Layers, or twice as many where K and V lie apart.
        row_bytes: Of one block in one region.
        blocks: Of the whole cache.
    """

    name: str
    regions: int
    row_bytes: int
    blocks: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all regions."""
        return self.regions * self.row_bytes


class CacheMemory:
    """A KV cache in this process.

    Attributes:
        rows: Shape [regions, blocks, bytes of a row], uint8.
        kv_regions: As a transport takes them.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.rows: npt.NDArray[np.uint8] = np.zeros(
            (layout.regions, layout.blocks, layout.row_bytes), dtype=np.uint8
        )
        self.kv_regions = [KvRegion(part.ctypes.data, layout.blocks, layout.row_bytes) for part in self.rows]

    def fill(self) -> None:
        """Gives each row a byte that tells region and block, but not 0."""
        region, block = np.ogrid[: self.rows.shape[0], : self.rows.shape[1]]
        self.rows[:] = _content(region, block)[:, :, None]

    def holds(self, remote: Sequence[int], local: Sequence[int]) -> bool:
        """Whether each local block has what `fill` writes to its remote one."""
        region = np.arange(self.rows.shape[0])[:, None]
        expected = _content(region, np.asarray(remote)[None, :])
        return all((self.rows[:, block] == expected[:, i, None]).all() for i, block in enumerate(local))


def _content(region: npt.NDArray[np.int_], block: npt.NDArray[np.int_]) -> npt.NDArray[np.uint8]:
    return (1 + (region * 17 + block * 7) % 251).astype(np.uint8)


class BlockOwner:
    """A process with a filled cache, which peers read. Use as a context.

    Raises:
        PdServeError: The process does not start. Only when the context is entered.

    Attributes:
        endpoint: For `NixlTransport.read`.
        metadata: Of an agent of its own for readers without our transport.
        kv_regions: The cache, as addresses in the owner.
    """

    def __init__(self, layout: CacheLayout) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, self._theirs = spawn.Pipe()
        self._process = spawn.Process(target=_own, args=(self._theirs, layout), daemon=True)
        self.endpoint = self.metadata = b""
        self.kv_regions: list[KvRegion] = []

    async def __aenter__(self) -> "BlockOwner":
        self._process.start()
        self._theirs.close()
        try:
            if not await asyncio.to_thread(self._connection.poll, ANSWER_S):
                raise PdServeError("the owner of the blocks does not answer")
            self.endpoint, self.metadata, self.kv_regions = self._connection.recv()
        except EOFError:
            raise PdServeError("the owner of the blocks has ended; see its error above") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        await asyncio.to_thread(self._process.join, ANSWER_S)


def _own(connection: Connection, layout: CacheLayout) -> None:
    memory = CacheMemory(layout)
    memory.fill()
    transport = NixlTransport("owner")
    transport.register(memory.kv_regions)
    agent = NixlAgent("owner-nixl", memory.kv_regions, progress_thread=True)
    connection.send((transport.endpoint(), agent.metadata(), memory.kv_regions))
    with contextlib.suppress(EOFError):
        connection.recv()  # it ends with its reader
    agent.close()
    transport.close()
