"""The reading agent of a NIXL transport with the peers that it is connected to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from migration.transport.head_slices import KvRows, rows_of
from migration.transport.kv_transport import KvRegion
from migration.transport.nixl_agent import Indices, NixlAgent, NixlFailure, memory_kind


@dataclass(frozen=True, slots=True)
class BlockList:
    """All blocks, or a slice of each, prepared for NIXL. Row b of entry r has index `first[r] + b`."""

    handle: int
    first: Indices

    def indices(self, blocks: Indices) -> Indices:
        return (self.first[:, None] + blocks[None, :]).ravel()


BlockLists = dict[str, BlockList]  #: By memory kind.


@dataclass(frozen=True, slots=True)
class ReadPath:
    """What is read of each block of a peer, and where it goes.

    Attributes:
        metadata: The peer agent's.
        local: None for whole blocks.
    """

    metadata: bytes
    remote: tuple[KvRows, ...]
    local: tuple[KvRows, ...] | None = None


@dataclass(frozen=True, slots=True)
class ConnectedPeer:
    """A connected peer with its blocks, and those here that they are for."""

    path: ReadPath
    agent_name: str
    remote: BlockLists
    local: BlockLists


class ConnectError(Exception):
    """A peer could not be connected; nothing was started."""


class NixlConnections:
    """One agent at a time, opened again when needed. Belongs to the reader's thread.

    Args:
        name: Prefix of the agents' names; unique among all agents.
        regions: The local regions.

    Attributes:
        agent: None after `close`, until the next `connect`.
        peers: By name.

    Raises:
        NixlFailure: The regions cannot be registered.
    """

    def __init__(self, name: str, regions: Sequence[KvRegion]) -> None:
        self.agent: NixlAgent | None = None
        self.peers: dict[str, ConnectedPeer] = {}
        self._name = name
        self._regions = tuple(regions)
        self._whole: BlockLists = {}
        self._generations = itertools.count()
        self._open()

    def connect(self, name: str, path: ReadPath) -> ConnectedPeer:
        """Connects to a peer. Raises: ConnectError."""
        try:
            agent = self.agent or self._open()
            agent_name = agent.connect(path.metadata)
            local: BlockLists = {}
            try:
                local = self._whole if path.local is None else _prepare(agent, None, path.local)
                remote = _prepare(agent, agent_name, path.remote)
            except NixlFailure:
                self._discard(agent, local)
                agent.disconnect(agent_name)
                raise
        except NixlFailure as failure:
            raise ConnectError(f"cannot connect: {failure}") from failure
        self.peers[name] = peer = ConnectedPeer(path, agent_name, remote, local)
        return peer

    def disconnect(self, name: str) -> None:
        """Drops a peer. Raises: NixlFailure: only `close` does it for certain."""
        peer = self.peers.pop(name, None)
        if peer is None or self.agent is None:
            return
        self._discard(self.agent, peer.remote)
        self._discard(self.agent, peer.local)
        self.agent.disconnect(peer.agent_name)

    def _discard(self, agent: NixlAgent, lists: BlockLists) -> None:
        if lists is not self._whole:
            for blocks in lists.values():
                agent.discard(blocks.handle)

    def close(self) -> None:
        """Destroys the agent, and with it all transfers and connections."""
        agent, self.agent = self.agent, None
        self.peers.clear()
        self._whole = {}
        if agent is not None:
            agent.close()

    def _open(self) -> NixlAgent:
        name = f"{self._name}/read-{next(self._generations)}"
        agent = NixlAgent(name, self._regions, progress_thread=False)
        try:
            self._whole = _prepare(agent, None, rows_of(self._regions, None))
        except NixlFailure:
            agent.close()
            raise
        self.agent = agent
        return agent


def _prepare(agent: NixlAgent, agent_name: str | None, rows: Sequence[KvRows]) -> BlockLists:
    kinds: dict[str, list[KvRows]] = {}
    for entry in rows:
        kinds.setdefault(memory_kind(entry), []).append(entry)
    return {
        kind: BlockList(
            agent.prepare(agent_name, members),
            np.cumsum([0, *(member.number for member in members[:-1])], dtype=np.int32),
        )
        for kind, members in kinds.items()
    }
