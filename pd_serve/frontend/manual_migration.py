"""Moving one request because somebody asks for it, and waiting until it speaks from there."""

import asyncio
from collections.abc import Mapping
from typing import Literal

from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.instance_directory import CALL_TIMEOUT_S, InstanceDirectory
from pd_serve.comm.messages import AbortRequests, AddRequest, MigrateRequest
from pd_serve.errors import EngineDeadError, MigrationRefusedError, RefusalCode, UnknownTargetError
from pd_serve.frontend.tracked_request import TrackedRequest
from pd_serve.observe.timeline import ObservedMigration

MigrationMode = Literal["live", "blocking", "recompute"]


class ManualMigration:
    """Args: `routes` are the router's requests in progress."""

    def __init__(self, routes: Mapping[RequestId, TrackedRequest], instances: InstanceDirectory) -> None:
        self._routes = routes
        self._instances = instances

    async def migrate(
        self, request_id: str, destination: str, mode: MigrationMode = "live"
    ) -> ObservedMigration:
        """See `ClusterView`. The other modes are baselines for the benchmark: stop-and-copy, and abort
        here with a recompute there."""
        route = self._routes.get(RequestId(request_id))
        if route is None:
            raise UnknownTargetError(f"no running request {request_id!r}")
        if destination not in self._instances:
            raise UnknownTargetError(f"no instance {destination!r}; see GET /cluster")
        if mode == "recompute":
            return await self._restart(route, destination)
        while True:
            owner, moves = route.ledger.owner, route.ledger.num_moves
            try:
                record: MigrationRecord = (
                    await self._instances.call(
                        owner,
                        lambda call_id: MigrateRequest(
                            call_id, route.request_id, destination, "manual", blocking=mode == "blocking"
                        ),
                    )
                ).record
            except EngineDeadError as error:
                text = f"{error}; the request is recomputed elsewhere"
                raise MigrationRefusedError(text, RefusalCode.PEER_LOST) from error
            if record.refusal is None:
                break
            if record.refusal.code is not RefusalCode.NOT_RUNNING or route.ledger.owner == owner:
                raise MigrationRefusedError(record.why, record.refusal.code)
        await self._next_owner_speaks(route, moves)
        return self._moved(route, record)

    async def _restart(self, route: TrackedRequest, destination: str) -> ObservedMigration:
        owner, moves = route.ledger.owner, route.ledger.num_moves
        epoch = route.ledger.take_over(destination)
        self._instances.send(owner, AbortRequests([route.request_id], epoch))
        tokens = list(route.ledger.token_ids)
        message = AddRequest(route.request_id, self._instances.token_endpoint, epoch, None, tokens)
        self._instances.send(destination, message, route.payload)
        await self._next_owner_speaks(route, moves)
        record = MigrationRecord(
            request_id=route.request_id,
            source=InstanceId(owner),
            destination=InstanceId(destination),
            reason="manual",
            tokens=route.request.prompt_tokens + len(tokens),
        )
        return self._moved(route, record)

    @staticmethod
    def _moved(route: TrackedRequest, record: MigrationRecord) -> ObservedMigration:
        now = asyncio.get_running_loop().time()
        return ObservedMigration(record, now, downtime_s=route.ledger.last_gap_s)

    async def _next_owner_speaks(self, route: TrackedRequest, moves: int) -> None:
        """Returns at the first token of an owner after the first `moves`, or when the request has ended."""
        ledger = route.ledger
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while route.request_id in self._routes and not (
                ledger.num_moves > moves and ledger.owner_has_spoken
            ):
                waiter = asyncio.get_running_loop().create_future()
                route.moved.append(waiter)
                await waiter
