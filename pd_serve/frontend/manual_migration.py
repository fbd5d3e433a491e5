"""Manual migrations: moves one request for an operator, and waits for a token from the destination."""

import asyncio
from collections.abc import Mapping
from typing import Literal

from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import AbortRequests
from pd_serve.comm.requests import ManualMigration, MoveRequest
from pd_serve.comm.timing import CALL_TIMEOUT_S
from pd_serve.errors import EngineDeadError, MigrationRefusedError, RefusalCode, UnknownTargetError
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.placement import RequestPlacement
from pd_serve.frontend.tracked_request import TrackedRequest

#: Blocking (stop-and-copy) and recompute are baselines for the benchmark.
MigrationMode = Literal["live", "blocking", "recompute"]


class ManualMigrations:
    """Moves single requests for operators.

    Args:
        requests: Requests in progress, by id.
    """

    def __init__(
        self,
        wire: MessageWire,
        requests: Mapping[RequestId, TrackedRequest],
        instances: Instances,
        placement: RequestPlacement,
    ) -> None:
        self._wire = wire
        self._requests = requests
        self._instances = instances
        self._placement = placement

    async def migrate(
        self, request_id: str, destination: str, mode: MigrationMode = "live"
    ) -> ManualMigration:
        """See `pd_serve.api.cluster_view.ClusterView.migrate`."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._migrate(request_id, destination, mode)
        except TimeoutError as error:
            text = f"{destination} has not continued {request_id} within {CALL_TIMEOUT_S:.0f} s"
            raise MigrationRefusedError(text, RefusalCode.TIMED_OUT) from error

    async def _migrate(self, request_id: str, destination: str, mode: MigrationMode) -> ManualMigration:
        request = self._requests.get(RequestId(request_id))
        if request is None:
            raise UnknownTargetError(f"no running request {request_id!r}")
        if destination not in self._instances:
            raise UnknownTargetError(f"no instance {destination!r}; see GET /cluster")
        if not request.ledger.owner:
            text = f"{request_id} waits for an instance that has room"
            raise MigrationRefusedError(text, RefusalCode.NOT_RUNNING)
        if mode == "recompute":
            return await self._restart(request, destination)
        move = MoveRequest(request.request_id, InstanceId(destination), blocking=mode == "blocking")
        while True:
            owner, moves = request.ledger.owner, request.ledger.num_moves
            try:
                record = await self._instances.call(owner, move)
            except EngineDeadError as error:
                text = f"{error}; the request is recomputed elsewhere"
                raise MigrationRefusedError(text, RefusalCode.PEER_LOST) from error
            if record.refusal is None:
                break
            if record.refusal.code is not RefusalCode.NOT_HERE or request.ledger.owner == owner:
                raise MigrationRefusedError(record.why, record.refusal.code)
            # The request has moved meanwhile: call its next owner.
        await self._wait_for_next_owner(request, moves)
        return ManualMigration(record, request.ledger.last_gap_s)

    async def _restart(self, request: TrackedRequest, destination: str) -> ManualMigration:
        owner, moves = request.ledger.owner, request.ledger.num_moves
        epoch = request.ledger.take_over(destination)
        self._wire.send(owner, AbortRequests([request.request_id], epoch))
        num_tokens = request.num_tokens
        self._placement.move_by_recompute(request, destination)
        await self._wait_for_next_owner(request, moves)
        record = MigrationRecord(
            request_id=request.request_id,
            source=InstanceId(owner),
            destination=InstanceId(destination),
            reason="manual",
            tokens=num_tokens,
        )
        return ManualMigration(record, request.ledger.last_gap_s)

    async def _wait_for_next_owner(self, request: TrackedRequest, moves: int) -> None:
        """Returns at the first token of an owner after `moves` moves, or when the request has ended."""
        ledger = request.ledger
        while request.request_id in self._requests and not (
            ledger.num_moves > moves and ledger.has_token_of_owner
        ):
            waiter = asyncio.get_running_loop().create_future()
            request.move_waiters.append(waiter)
            await waiter
