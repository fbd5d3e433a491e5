"""Who an instance hears from and speaks to: API servers, schedulers, other instances."""

import asyncio
import logging
from collections.abc import Callable, Iterator

from pd_serve.comm.messages import Hello
from pd_serve.comm.wire import Wire

logger = logging.getLogger(__name__)

#: An API server or scheduler that has said nothing for so long is gone.
LEASE_S = 30.0


class ApiServerPeer:
    """An API server as an instance sees it."""

    def __init__(self, token_endpoint: str) -> None:
        self.token_endpoint = token_endpoint
        self.heard_at = 0.0
        self.peers: dict[str, str] = {}


class Peers:
    """Lives on the running event loop.

    Args:
        name: Of the instance itself.
        on_peer_lost: Told of another instance that nobody knows any more.

    Attributes:
        servers: API servers by name.
        greeted_at: When one of them was last heard, on the loop's clock.
    """

    def __init__(self, name: str, wire: Wire, on_peer_lost: Callable[[str], None]) -> None:
        self.servers: dict[str, ApiServerPeer] = {}
        self._name = name
        self._wire = wire
        self._on_peer_lost = on_peer_lost
        self._loop = asyncio.get_running_loop()
        self._schedulers: dict[str, float] = {}  # when each was last heard
        self._peers: dict[str, str] = {}
        self.greeted_at = self._loop.time()

    def __iter__(self) -> Iterator[str]:
        """Names of those who are told the load."""
        return iter([*self.servers, *self._schedulers])

    def knows(self, instance_id: str) -> bool:
        """Whether this other instance is there, as far as is known."""
        return instance_id in self._peers

    def on_hello(self, sender: str, message: Hello) -> None:
        server = self.servers.get(sender)
        if server is None:
            server = self.servers[sender] = ApiServerPeer(message.token_endpoint)
        server.heard_at = self.greeted_at = self._loop.time()
        server.peers = dict(message.peers)
        self._wire.connect(sender, message.address)
        self._update_peers()

    def on_subscribe(self, scheduler: str, address: str) -> None:
        self._wire.connect(scheduler, address)
        self._schedulers[scheduler] = self._loop.time()

    def on_lost(self, instance_id: str) -> None:
        """An API server says that another instance has died: no longer a peer, whoever else knows it."""
        for server in self.servers.values():
            server.peers.pop(instance_id, None)
        self._drop_peer(instance_id)

    def _update_peers(self) -> None:
        """An instance is a peer as long as anybody knows it: one may hear of a new one before the others."""
        peers = {name: address for s in self.servers.values() for name, address in s.peers.items()}
        peers.pop(self._name, None)
        for gone in set(self._peers) - set(peers):
            self._drop_peer(gone)
        for peer, address in peers.items():
            self._peers[peer] = address
            self._wire.connect(peer, address)

    def _drop_peer(self, instance_id: str) -> None:
        if self._peers.pop(instance_id, None) is not None:
            logger.info("%s: %s is gone", self._name, instance_id)
            self._wire.disconnect(instance_id)
            self._on_peer_lost(instance_id)

    def forget_silent(self) -> list[ApiServerPeer]:
        """Who has said nothing for `LEASE_S` is gone. Returns the API servers among them."""
        oldest = self._loop.time() - LEASE_S
        for name in [name for name, heard_at in self._schedulers.items() if heard_at < oldest]:
            logger.warning("%s: scheduler %s is gone", self._name, name)
            del self._schedulers[name]
            self._wire.disconnect(name)
        gone = {name: server for name, server in self.servers.items() if server.heard_at < oldest}
        for name in gone:
            logger.warning("%s: API server %s is gone, ending its requests", self._name, name)
            del self.servers[name]
            self._wire.disconnect(name)
        if gone:
            self._update_peers()
        return list(gone.values())
