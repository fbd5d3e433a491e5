"""A NIXL agent with the settings this project needs, in the few verbs it uses.

It drives NIXL's bindings, not its `nixl_agent` class, because that class fixes the progress thread's
delay at 0, with which the thread polls without end: one core per agent, busy or idle (measured). With a
delay the thread sleeps on UCX's event descriptor, and the delay is only a safety net.

Source: nixl 1.5.1, `nixl_cu12/_api.py`; `src/plugins/ucx/ucx_engine_thread.cpp` of the NIXL sources.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from migration.transport.head_slices import KvRows
from migration.transport.kv_transport import KvRegion

# The safety net's period. Idle agents used 0.08 % of a core at 100 ms, 1.5 % at 1 ms.
PROGRESS_PERIOD_US = 100_000

#: Set before the libraries are loaded; the user's settings win.
ENVIRONMENT = {
    # NIXL and UCX report a lost peer on stderr as well as by a status. The status is enough here, and losing
    # a peer is part of normal life.
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "error",
    # Against a leak in UCX, as vLLM does: _maybe_set_ucx_rcache_limit in vllm/distributed/nixl_utils.py.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
    # Between GPUs without NVLink UCX would only write through cuda_ipc, not read, and emulate reads by TCP.
    # Source: uct_cuda_ipc_iface_get_max_get_zcopy of UCX; NIXL's pull request 2208 sets it, too.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}

#: The packages of NIXL's builds.
BUILDS = ("nixl_cu13", "nixl_cu12")

Indices = npt.NDArray[np.int32]


class NixlFailure(Exception):
    """A NIXL call failed. Internal to the transport, which turns it into `PeerLostError`."""


class NixlAgent:
    """One agent with its registered memory. Not thread safe: one thread at a time may use it.

    Args:
        name: Must differ from the names of all agents it talks to.
        regions: Memory to register for the agent's whole life.
        progress_thread: Whether a (native) thread answers peers. See `NixlTransport`.

    Raises:
        NixlFailure: The memory could not be registered, or there is no UCX plugin.
    """

    def __init__(self, name: str, regions: Sequence[KvRegion], *, progress_thread: bool) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self._cuda_device = max((region.device_id for region in regions), default=-1)
        self._nixl = _bindings = _import_bindings(for_gpu=self._cuda_device >= 0)
        known = [member for member in vars(_bindings).values() if isinstance(member, type)]
        nixl_errors = [member for member in known if issubclass(member, Exception)]
        self._errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, *nixl_errors)
        config = _bindings.nixlAgentConfig()
        config.useProgThread = progress_thread
        config.useListenThread = False
        config.syncMode = _bindings.NIXL_THREAD_SYNC_NONE
        config.pthrDelay = PROGRESS_PERIOD_US
        config.lthrDelay = PROGRESS_PERIOD_US
        config.captureTelemetry = False
        self._agent: Any = _bindings.nixlAgent(name, config)
        self._registered: list[Any] = []
        try:
            self.enter_thread()
            self._agent.createBackend("UCX", {})
            for memory, ranges in _ranges(regions).items():
                descriptors = _bindings.nixlRegDList(getattr(_bindings, memory), ranges)
                self._agent.registerMem(descriptors, [])
                self._registered.append(descriptors)
        except self._errors as error:
            self.close()
            raise NixlFailure(f"NIXL agent {name!r} could not be set up: {error!r}") from error

    @contextlib.contextmanager
    def _failing_as(self, call: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise NixlFailure(f"{call}: {error!r}") from error

    def enter_thread(self) -> None:
        """To be called first in a thread that uses the agent: gives it a current CUDA context.

        UCX looks for one when it makes a backend, connects and copies, and goes without cuda_ipc, that is
        without NVLink, where it finds none. `set_device` alone makes none current on device 0, the default
        of a new thread; an allocation does.

        Source: _nixl_handshake of vLLM's NixlConnector, set_device in vllm/platforms/cuda.py.
        """
        if self._cuda_device >= 0:
            import torch

            device = torch.device("cuda", self._cuda_device)
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)

    def metadata(self) -> bytes:
        """What a peer's `connect` needs."""
        return bytes(self._agent.getLocalMD())

    def connect(self, metadata: bytes) -> str:
        """Loads a peer's metadata and returns its agent name. The wire-up happens with the first read.

        Raises:
            NixlFailure: The metadata is not valid, or the peer cannot be reached from here.
        """
        with self._failing_as("peer's metadata refused"):
            return bytes(self._agent.loadRemoteMD(metadata)).decode()

    def disconnect(self, agent_name: str) -> None:
        """Drops a peer. Reads of it must have ended."""
        with self._failing_as(f"disconnect from {agent_name!r}"):
            self._agent.invalidateRemoteMD(agent_name)

    def prepare(self, agent_name: str | None, rows: Sequence[KvRows]) -> int:
        """Makes a list of all rows of some regions of one memory kind, to read by index from then on.

        Row `b` of the entry at position `i` gets index `b` plus the rows of the entries before it.
        The list is stored as it is given: about 0.1 ms for 32 entries of 2,000 rows.

        Args:
            agent_name: The connected peer that owns the memory; None for this agent.

        Returns:
            A handle for `read` and `discard`.

        Raises:
            NixlFailure: The memory is not registered there.
        """
        nixl = self._nixl
        strided = np.array(
            [(r.address, r.size, _device(r), r.stride, r.number) for r in rows], dtype=np.int64
        )
        owner = nixl.NIXL_INIT_AGENT if agent_name is None else agent_name
        with self._failing_as(f"block list of {agent_name or 'this agent'}"):
            return int(self._agent.prepXferDlist(owner, getattr(nixl, memory_kind(rows[0])), strided, []))

    def discard(self, prepared: int) -> None:
        """Frees what `prepare` made."""
        with self._failing_as("release of a block list"):
            self._agent.releasedDlistH(prepared)

    def read(self, local: int, local_indices: Indices, remote: int, remote_indices: Indices) -> int | None:
        """Starts a read; NIXL merges runs that touch on both sides.

        Through shared memory the whole copy happens in here (without the GIL).

        Returns:
            A handle for `is_done`; None if the read has ended already.

        Raises:
            NixlFailure: The read failed. Some of it may still be under way until `close`.
        """
        handle = 0
        try:
            handle = int(
                self._agent.makeXferReq(
                    self._nixl.NIXL_READ, local, local_indices, remote, remote_indices, "", [], False
                )
            )
            if self._agent.postXferReq(handle) == self._nixl.NIXL_SUCCESS:
                self._agent.releaseXferReq(handle)
                return None
        except self._errors as error:
            if handle:
                self._agent.releaseXferReq(handle)
            raise NixlFailure(f"read: {error!r}") from error
        return handle

    def is_done(self, handle: int) -> bool:
        """Drives the agent's transfers and returns whether this one has ended. Does not wait.

        Raises:
            NixlFailure: The read failed. Some of it may still be under way until `close`.
        """
        with self._failing_as("read"):
            return bool(self._agent.getXferStatus(handle) == self._nixl.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Frees a read's handle. This does not stop the read: only `close` does, for all of them."""
        with self._failing_as("release of a read"):
            self._agent.releaseXferReq(handle)

    def progress(self) -> None:
        """Drives the agent while no read is polled: dropped connections end only while something drives it.

        Raises:
            NixlFailure: The agent is broken.
        """
        with self._failing_as("progress"):
            self._agent.getNotifs({}, [])  # this project sends no notifications

    def close(self) -> None:
        """Destroys the agent, its UCX worker and all connections: after this nothing reads or writes.

        Takes 3-7 ms, pending transfers or not. Idempotent.
        """
        agent, self._agent = self._agent, None
        if agent is None:
            return
        while self._registered:
            descriptors = self._registered.pop()
            try:
                agent.deregisterMem(descriptors, [])
            except self._errors:
                continue  # the destructor frees it
        del agent


def memory_kind(region: KvRegion | KvRows) -> str:
    """NIXL's name for the memory kind of a region."""
    return "DRAM_SEG" if region.device_id < 0 else "VRAM_SEG"


def _device(region: KvRegion | KvRows) -> int:
    return max(region.device_id, 0)


def _ranges(regions: Sequence[KvRegion]) -> dict[str, list[tuple[int, int, int, str]]]:
    """Address ranges to register per memory kind, as NIXL's (address, bytes, device, note).

    Host ranges that touch become one. Device ranges do not: they may be two allocations, and a
    registration must not span those.
    """
    ranges: dict[str, list[tuple[int, int, int, str]]] = {}
    for region in sorted(regions, key=lambda r: (r.device_id, r.address)):
        known = ranges.setdefault(memory_kind(region), [])
        length = region.num_blocks * region.block_bytes
        if known and region.device_id < 0 and known[-1][0] + known[-1][1] == region.address:
            known[-1] = (known[-1][0], known[-1][1] + length, 0, "")
        else:
            known.append((region.address, length, _device(region), ""))
    return ranges


def _import_bindings(*, for_gpu: bool) -> Any:
    """NIXL's bindings.

    The package `nixl` asks torch for its CUDA version, to choose among the installed builds: an import of
    3 s of CPU time where torch is not loaded yet. Without GPU memory every build serves.
    """
    if not for_gpu and "torch" not in sys.modules:
        for build in BUILDS:
            if importlib.util.find_spec(build) is not None:
                return importlib.import_module(f"{build}._bindings")
    return importlib.import_module("nixl._bindings")
