"""The reading agent of a NIXL transport with the peers that it is connected to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from migration.transport.kv_transport import KvRegion
from migration.transport.nixl_agent import Indices, NixlAgent, NixlFailure, memory_kind


@dataclass(frozen=True, slots=True)
class BlockList:
    """All blocks of some regions, prepared for NIXL. Block b of region r has index `first[r] + b`."""

    handle: int
    first: Indices

    def indices(self, blocks: Indices) -> Indices:
        return (self.first[:, None] + blocks[None, :]).ravel()


@dataclass(frozen=True, slots=True)
class ConnectedPeer:
    """A connected peer and its blocks, by memory kind."""

    metadata: bytes
    agent_name: str
    blocks: dict[str, BlockList]


class ConnectError(Exception):
    """A peer could not be connected; nothing was started."""


class NixlConnections:
    """One agent at a time, opened again when needed. Belongs to the reader's thread.

    Args:
        name: Prefix of the agents' names; unique among all agents.
        regions: The local regions.

    Attributes:
        agent: None after `close`, until the next `connect`.
        local: The local blocks, by memory kind.
        peers: By instance id.

    Raises:
        NixlFailure: The regions cannot be registered.
    """

    def __init__(self, name: str, regions: Sequence[KvRegion]) -> None:
        self.agent: NixlAgent | None = None
        self.local: dict[str, BlockList] = {}
        self.peers: dict[str, ConnectedPeer] = {}
        self._name = name
        self._regions = tuple(regions)
        self._generations = itertools.count()
        self._open()

    def connect(self, name: str, metadata: bytes, regions: Sequence[KvRegion]) -> ConnectedPeer:
        """Connects to a peer. Raises: ConnectError."""
        try:
            agent = self.agent or self._open()
            agent_name = agent.connect(metadata)
            try:
                peer = ConnectedPeer(metadata, agent_name, _prepare(agent, agent_name, regions))
            except NixlFailure:
                agent.disconnect(agent_name)
                raise
        except NixlFailure as failure:
            raise ConnectError(f"cannot connect: {failure}") from failure
        self.peers[name] = peer
        return peer

    def disconnect(self, name: str) -> None:
        """Drops a peer. Raises: NixlFailure: only `close` does it for certain."""
        peer = self.peers.pop(name, None)
        if peer is None or self.agent is None:
            return
        for blocks in peer.blocks.values():
            self.agent.discard(blocks.handle)
        self.agent.disconnect(peer.agent_name)

    def close(self) -> None:
        """Destroys the agent, and with it all transfers and connections."""
        agent, self.agent = self.agent, None
        self.peers.clear()
        self.local.clear()
        if agent is not None:
            agent.close()

    def _open(self) -> NixlAgent:
        name = f"{self._name}/read-{next(self._generations)}"
        agent = NixlAgent(name, self._regions, progress_thread=False)
        try:
            self.local = _prepare(agent, None, self._regions)
        except NixlFailure:
            agent.close()
            raise
        self.agent = agent
        return agent


def _prepare(agent: NixlAgent, agent_name: str | None, regions: Sequence[KvRegion]) -> dict[str, BlockList]:
    kinds: dict[str, list[KvRegion]] = {}
    for region in regions:
        kinds.setdefault(memory_kind(region), []).append(region)
    return {
        kind: BlockList(
            agent.prepare(agent_name, members),
            np.cumsum([0, *(member.num_blocks for member in members[:-1])], dtype=np.int32),
        )
        for kind, members in kinds.items()
    }
