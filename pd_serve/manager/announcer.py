"""Sends the membership to every process, and holds the leases of API servers."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from uuid import uuid4

from msgspec.structs import replace

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.leases import LeaseClock, Leases
from pd_serve.comm.membership import SCHEDULER, ApiServerInfo, Join, Membership
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.timing import API_SERVER_LEASE_S, HEARTBEAT_S

logger = logging.getLogger(__name__)


class Announcer:
    """Sends the membership on every change and as a heartbeat.

    Attributes:
        on_silent: Called with the name of an API server that is dropped because its lease has expired.

    Args:
        membership: Returns the present membership.
        state: Returns the state of the cluster, which API servers get with the membership.
        on_change: Called when an API server has joined or its lease has expired.
        on_gone: Called with the name of an API server that is no member any more.
    """

    def __init__(
        self,
        wire: MessageWire,
        clock: LeaseClock,
        membership: Callable[[], Membership],
        state: Callable[[], ClusterState],
        on_change: Callable[[], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._wire = wire
        self._membership = membership
        self._state = state
        self._on_change = on_change
        self._on_gone = on_gone
        self.on_silent: Callable[[str], None] = lambda name: None
        self._joins: dict[str, Join] = {}
        self._leases = Leases(API_SERVER_LEASE_S, clock)
        self._ended: set[str] = set()
        self._changed = asyncio.Event()
        self._tasks = BackgroundTasks()

    def open(self) -> None:
        self._tasks.start(self._announce())

    async def close(self) -> None:
        await self._tasks.cancel()

    def announce_soon(self) -> None:
        self._changed.set()

    @property
    def api_servers(self) -> dict[str, ApiServerInfo]:
        """The API servers that have joined, by name."""
        return {name: self._joins[name].info for name in sorted(self._joins)}

    def on_join(self, sender: str, join: Join) -> None:
        """Takes a join, or one that an earlier manager has noted, with its `joined`."""
        if sender in self._ended:
            return  # sent before its end
        known, info = self._joins.get(sender), join.info
        if known is not None and info == replace(known.info, joined=info.joined):
            info = known.info
        elif not info.joined:
            info = replace(info, joined=uuid4().hex)
        self._joins[sender] = Join(info, join.unused, join.term)
        self._leases.renew(sender)
        self._wire.connect(sender, info.address)
        if known is None or known.info != info:
            self._on_change()

    def is_used(self, instance_id: str) -> bool:
        """Whether an API server may still have requests on an instance that is leaving."""
        return any(instance_id not in join.unused for join in self._joins.values())

    async def _announce(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                self._drop_expired_api_servers()
                self._send()
            except Exception as error:  # whatever it is: the others need the next heartbeat
                self._wire.failures.record("announcing the membership", error)

    def drop_ended(self, name: str) -> None:
        """The process of an API server has ended: its requests are orphans from now on."""
        self._ended.add(name)
        if name in self._joins:
            self._drop(name)

    def _drop_expired_api_servers(self) -> None:
        for name in self._leases.expired():
            logger.warning("API server %s has sent nothing for %.0f s", name, API_SERVER_LEASE_S)
            self._drop(name)
            self.on_silent(name)

    def _drop(self, name: str) -> None:
        self._leases.drop(name)
        del self._joins[name]
        self._wire.disconnect(name)
        self._on_gone(name)
        self._on_change()

    def _send(self) -> None:
        membership = self._membership()
        for info in membership.instances:
            self._wire.send(info.instance_id, membership)
        self._wire.send(SCHEDULER, membership)
        if self._joins:
            state = self._state()
            for name in self._joins:
                self._wire.send(name, membership)
                self._wire.send(name, state)
