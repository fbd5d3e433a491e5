"""The API servers of the cluster, as one of them sees them: what each has, and calls of the others.

Each tells the others at once, at most every `STATUS_INTERVAL_S`, so that counts and limits of the service
speak of all of them. What was told last counts as long as an API server is a member.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import ApiServerInfo, ApiServerStatus, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.rpc import Request, RpcClient
from pd_serve.comm.timing import HEARTBEAT_S, STATUS_INTERVAL_S
from pd_serve.errors import PdServeError
from pd_serve.frontend.snapshot import ApiServerSnapshot

R = TypeVar("R")

NOTHING = ApiServerStatus()


class ApiServers:
    """Args:
        calls: Calls any process of the cluster.

    Attributes:
        counts: What this API server has now, by field of `ApiServerStatus`. Each part of it adds its own.
    """

    def __init__(self, wire: MessageWire, members: MembershipView, calls: RpcClient) -> None:
        self.counts: dict[str, Callable[[], int]] = {}
        self._wire = wire
        self._members = members
        self._calls = calls
        self._others: dict[str, ApiServerStatus] = {}
        self._told: dict[str, ApiServerStatus] = {}
        self._tasks = BackgroundTasks(wire.failures.task_failed)

    def open(self) -> None:
        """Begins to tell the others what this one has."""
        self._tasks.start(self._tell())

    async def close(self) -> None:
        await self._tasks.cancel()

    # ---- what it receives

    def on_status(self, sender: str, status: ApiServerStatus) -> None:
        if sender in self._members.api_servers:
            self._others[sender] = status

    def on_left(self, api_servers: Mapping[str, ApiServerInfo]) -> None:
        """These are no members any more, or other processes now."""
        for name in api_servers:
            self._others.pop(name, None)
            self._told.pop(name, None)
            self._calls.peer_lost(name)

    # ---- what it knows

    @property
    def own(self) -> ApiServerStatus:
        return ApiServerStatus(**{name: count() for name, count in self.counts.items()})

    def elsewhere(self, field: str) -> int:
        """Sum of a field of `ApiServerStatus` over the other API servers."""
        return sum(getattr(status, field) for status in self._others.values())

    def everywhere(self, field: str) -> int:
        """The same with this API server."""
        return int(getattr(self.own, field)) + self.elsewhere(field)

    def snapshot(self) -> list[ApiServerSnapshot]:
        """All API servers by name, this one among them once it is a member."""
        known = {**self._others, self._wire.name: self.own}
        return [
            ApiServerSnapshot(name, info.pid, known.get(name, NOTHING).requests)
            for name, info in sorted(self._members.api_servers.items())
        ]

    async def ask_others(self, requests: Mapping[str, Request[R]], timeout_s: float) -> dict[str, R]:
        """Calls other API servers, each with its request. Those that do not answer in time are left out."""

        async def ask(name: str) -> R | None:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._calls.call(name, requests[name])
            except (PdServeError, TimeoutError):
                return None

        answers = await asyncio.gather(*map(ask, requests))
        return {name: answer for name, answer in zip(requests, answers, strict=True) if answer is not None}

    @property
    def others(self) -> list[str]:
        """Names of the other members."""
        return [name for name in self._members.api_servers if name != self._wire.name]

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        beat_at = 0.0
        while True:
            own, others = self.own, self.others
            is_beat = loop.time() >= beat_at
            for name in others:
                if is_beat or self._told.get(name) != own:
                    self._told[name] = own
                    self._wire.send(name, own)
            if is_beat:
                beat_at = loop.time() + HEARTBEAT_S
            await asyncio.sleep(STATUS_INTERVAL_S if others else HEARTBEAT_S)
