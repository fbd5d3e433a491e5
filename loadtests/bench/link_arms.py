"""The ways in which `bench links` reads the same blocks.

NIXL alone is measured as its own benchmark (`benchmark/nixlbench/src/worker/nixl/nixl_worker.cpp` of
the NIXL sources) does by default: no progress thread in the reader, one request for all rows, made once, then
posted again and again and polled without sleep until it is done. That program is not in NIXL's wheel, and
needs an etcd server, so the same calls are made here through NIXL's Python API.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from loadtests.bench.link_memory import BlockOwner, CacheMemory
from migration.incoming import SLICE_BYTES
from migration.local_instance import Pacer
from migration.transport.kv_transport import KvRegion
from migration.transport.nixl import NixlTransport
from pd_serve.errors import PdServeError

MEMCPY, NIXL, OURS, PACED = "memcpy", "NIXL alone", "ours", "ours, paced"


class LinkArm(Protocol):
    """Copies `remote[i]` over the local `local[i]`, in every region."""

    def choose(self, remote: Sequence[int], local: Sequence[int]) -> None:
        """What `read` copies from now on."""

    async def read(self) -> None:
        """Copies all of it once."""

    def close(self) -> None: ...


class Memcpy:
    """numpy copies the rows in this process, from memory that is its own, in one thread."""

    def __init__(self, source: CacheMemory, local: CacheMemory) -> None:
        self._source, self._local = source, local
        self._pairs: list[tuple[Any, Any]] = []

    def choose(self, remote: Sequence[int], local: Sequence[int]) -> None:
        self._pairs = [
            (ours[to], theirs[of])
            for ours, theirs in zip(self._local.rows, self._source.rows, strict=True)
            for of, to in zip(remote, local, strict=True)
        ]

    async def read(self) -> None:
        for ours, theirs in self._pairs:
            np.copyto(ours, theirs)

    def close(self) -> None:
        self._pairs.clear()


class NixlAlone:
    """NIXL's calls without our reader, in the thread of the caller."""

    def __init__(self, owner: BlockOwner, local: CacheMemory) -> None:
        api = importlib.import_module("nixl._api")
        self._local, self._remote = local.kv_regions, owner.kv_regions
        self._agent = api.nixl_agent(
            "reader-nixl", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        ranges = [(region.address, region.num_blocks * region.block_bytes, 0, "") for region in self._local]
        self._registered = self._agent.register_memory(ranges, "DRAM")
        self._peer = self._agent.add_remote_agent(owner.metadata)
        self._request: Any = None

    def choose(self, remote: Sequence[int], local: Sequence[int]) -> None:
        self._release()
        sides = [_rows(self._local, local), _rows(self._remote, remote)]
        ours, theirs = (self._agent.get_xfer_descs(rows, "DRAM") for rows in sides)
        self._request = self._agent.initialize_xfer("READ", ours, theirs, self._peer)

    async def read(self) -> None:
        agent, request = self._agent, self._request
        state = agent.transfer(request)
        while state == "PROC":
            state = agent.check_xfer_state(request)
        if state != "DONE":
            raise PdServeError(f"NIXL's read ended as {state}")

    def close(self) -> None:
        self._release()
        self._agent.remove_remote_agent(self._peer)
        self._agent.deregister_memory(self._registered)

    def _release(self) -> None:
        if self._request is not None:
            self._agent.release_xfer_handle(self._request)
            self._request = None


class OurTransport:
    """`NixlTransport`, as an instance reads the blocks of a request.

    Args:
        bytes_per_s: As an instance copies what may wait: in slices, at this rate. None: all at once.
    """

    def __init__(
        self, transport: NixlTransport, owner: BlockOwner, block_bytes: int, bytes_per_s: float | None = None
    ) -> None:
        self._transport, self._endpoint = transport, owner.endpoint
        self._pacer = Pacer(bytes_per_s)
        self._slice = max(1, SLICE_BYTES // block_bytes) if self._pacer.paces else None
        self._remote: Sequence[int] = ()
        self._local: Sequence[int] = ()

    def choose(self, remote: Sequence[int], local: Sequence[int]) -> None:
        self._remote, self._local = remote, local

    async def read(self) -> None:
        size = self._slice or len(self._remote)
        for start in range(0, len(self._remote), size):
            now = slice(start, start + size)
            copied = await self._transport.read("owner", self._endpoint, self._remote[now], self._local[now])
            await self._pacer.copied(copied)

    def close(self) -> None:
        self._transport.close()


def _rows(regions: Sequence[KvRegion], blocks: Sequence[int]) -> Any:
    """NIXL's descriptors of these blocks in all regions, shape [rows, 3], uint64: address, bytes, device."""
    rows = [(r.address + block * r.block_bytes, r.block_bytes, 0) for r in regions for block in blocks]
    return np.array(rows, dtype=np.uint64)
