"""Tells every process the membership, and keeps the leases of API servers."""

import asyncio
import logging
from collections.abc import Callable

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.membership import SCHEDULER, ApiServerInfo, Join, Membership
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.timing import API_SERVER_LEASE_S, HEARTBEAT_S, TAKE_OVER_GRACE_S

logger = logging.getLogger(__name__)


class Announcer:
    """Sends the membership on every change and as a heartbeat.

    Args:
        membership: Gives the present membership with these API servers.
        state: Gives what API servers show beside the members.
    """

    def __init__(
        self,
        wire: MessageWire,
        membership: Callable[[dict[str, ApiServerInfo]], Membership],
        state: Callable[[], ClusterState],
    ) -> None:
        self._wire = wire
        self._membership = membership
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._joins: dict[str, tuple[float, Join]] = {}
        self._all_found_at = 0.0
        self._changed = asyncio.Event()
        self._tasks = BackgroundTasks()

    def open(self, *, took_over: bool) -> None:
        """Begins to announce. After a take-over, API servers have yet to find this manager."""
        self._all_found_at = self._loop.time() + (TAKE_OVER_GRACE_S if took_over else 0.0)
        self._tasks.start(self._announce())

    async def close(self) -> None:
        await self._tasks.cancel()

    def announce_soon(self) -> None:
        self._changed.set()

    @property
    def api_servers(self) -> list[str]:
        return sorted(self._joins)

    def on_join(self, sender: str, join: Join) -> None:
        known = self._joins.get(sender)
        self._joins[sender] = (self._loop.time(), join)
        self._wire.connect(sender, join.info.address)
        if known is None or known[1].info != join.info:
            self.announce_soon()

    def is_used(self, instance_id: str) -> bool:
        """Whether an API server may still have requests on an instance that is leaving."""
        used = any(instance_id not in join.unused for _, join in self._joins.values())
        return used or self._loop.time() < self._all_found_at

    async def _announce(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                self._drop_silent_api_servers()
            self._changed.clear()
            self._send()

    def _drop_silent_api_servers(self) -> None:
        oldest = self._loop.time() - API_SERVER_LEASE_S
        for name in [name for name, (heard_at, _) in self._joins.items() if heard_at < oldest]:
            logger.warning("API server %s is gone", name)
            del self._joins[name]
            self._wire.disconnect(name)

    def _send(self) -> None:
        membership = self._membership({name: join.info for name, (_, join) in self._joins.items()})
        for info in membership.instances:
            self._wire.send(info.instance_id, membership)
        self._wire.send(SCHEDULER, membership)
        if self._joins:
            state = self._state()
            for name in self._joins:
                self._wire.send(name, membership)
                self._wire.send(name, state)
