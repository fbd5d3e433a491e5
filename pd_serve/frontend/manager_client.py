"""An API server's client of the manager: finds it, joins the cluster, calls it, sends heartbeats."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec.structs import replace

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import ClusterState, RestartState
from pd_serve.comm.membership import MANAGER, SCHEDULER, ApiServerInfo, Join, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import Heartbeat
from pd_serve.comm.rpc import Request, RpcClient
from pd_serve.comm.timing import HEARTBEAT_S, MANAGER_LEASE_S, POLL_S
from pd_serve.errors import EngineDeadError
from router.request import Demand

logger = logging.getLogger(__name__)

R = TypeVar("R")


class ManagerClient:
    """Finds and calls the manager, and sends this API server's heartbeats to all processes.

    Args:
        find_manager: Returns the manager's address. Raises: PdServeError: It cannot be found now.
        demand: Returns the demand of the waiting line.
        is_unused: Whether a leaving instance has no request of this API server, and will get none.

    Attributes:
        num_heartbeats: Number of the last heartbeat.
    """

    def __init__(
        self,
        wire: MessageWire,
        members: MembershipView,
        calls: RpcClient,
        find_manager: Callable[[], Awaitable[str]],
        demand: Callable[[], Demand],
        is_unused: Callable[[str], bool],
    ) -> None:
        self.num_heartbeats = 0
        self._wire = wire
        self._members = members
        self._calls = calls
        self._find_manager = find_manager
        self._demand = demand
        self._is_unused = is_unused
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._state: ClusterState | None = None
        self._searched_at = self._joined_at = -MANAGER_LEASE_S

    def open(self, info: ApiServerInfo) -> None:
        """Begins to look for the manager, to join and to send heartbeats; `info` is this API server's."""
        self._tasks.start(self._keep_joined(info))
        self._tasks.start(self._heartbeat())

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def is_alive(self) -> bool:
        """Whether the manager's lease has not expired."""
        known = self._members.latest is not None
        return known and self._loop.time() - self._members.received_at <= MANAGER_LEASE_S

    def on_state(self, state: ClusterState) -> None:
        self._state = state

    @property
    def state(self) -> ClusterState | None:
        """Last state from the manager. While it is absent, the scheduler counts as absent, too."""
        state = self._state
        if state is None or self.is_alive:
            return state
        return replace(
            state,
            scheduler=replace(state.scheduler, state="absent"),
            restart=RestartState(False, state.restart.progress),
            scheduler_stats=None,
        )

    async def call(self, request: Request[R]) -> R:
        """Calls the manager. Raises: EngineDeadError: It is absent. PdServeError: It answered so."""
        if not self.is_alive:
            raise EngineDeadError("the manager is absent")
        try:
            return await self._calls.call(MANAGER, request)
        except TimeoutError as error:
            raise EngineDeadError("the manager does not answer") from error

    async def _keep_joined(self, info: ApiServerInfo) -> None:
        """Sends `Join` as a heartbeat, and as soon as a leaving instance becomes unused."""
        unused: list[str] = []
        while True:
            now = self._loop.time()
            if not self.is_alive and now - self._searched_at >= MANAGER_LEASE_S:
                self._searched_at = now
                self._calls.peer_lost(MANAGER)
                await self._search()
            latest = self._members.latest
            leaving, term = (latest.leaving, latest.term) if latest is not None else ([], 0)
            still_unused = [instance_id for instance_id in leaving if self._is_unused(instance_id)]
            if still_unused != unused or now - self._joined_at >= HEARTBEAT_S:
                unused, self._joined_at = still_unused, now
                self._wire.send(MANAGER, Join(info, unused, term))
            await asyncio.sleep(POLL_S if leaving or self._members.latest is None else HEARTBEAT_S)

    async def _search(self) -> None:
        try:
            async with asyncio.timeout(MANAGER_LEASE_S):
                self._wire.connect(MANAGER, await self._find_manager())
        except Exception as error:  # whatever it is, there has to be another try: this task keeps the lease
            logger.debug("the manager cannot be found: %s", error)

    async def _heartbeat(self) -> None:
        while True:
            self.num_heartbeats += 1
            heartbeat = Heartbeat(self._demand(), self.num_heartbeats)
            for instance_id in self._members.instances:
                self._wire.send(instance_id, heartbeat)
            self._wire.send(SCHEDULER, heartbeat)
            await asyncio.sleep(HEARTBEAT_S)
