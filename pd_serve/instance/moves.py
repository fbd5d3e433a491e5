"""Migrations ordered by the scheduler or an operator, and reports of all ended migrations."""

import asyncio
import logging

from migration.coordinator import MigrationCoordinator
from migration.engine_interface import Engine
from migration.errors import DestinationRefusedError, MigrationError, SourceGoneError
from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import MigrationEnded, MoveOut
from pd_serve.comm.requests import MoveRequest
from pd_serve.comm.timing import REFUSED_MOVE_S
from pd_serve.instance.load_reporter import LoadReporter
from router.rescheduling.selection import RequestSelector

logger = logging.getLogger(__name__)

#: Orders of the scheduler in progress at a time; further ones are refused.
MAX_ORDERS = 256


class Moves:
    """Carries out `MoveOut` orders and `MoveRequest` calls, and reports ended migrations to API servers.

    No order ends the instance: one that cannot be carried out is refused, and one that fails is counted.
    """

    def __init__(self, name: str, wire: MessageWire, members: MembershipView, reporter: LoadReporter) -> None:
        self._name = name
        self._wire = wire
        self._members = members
        self._reporter = reporter
        self._selector = RequestSelector()
        self._passed_over: set[tuple[RequestId, InstanceId]] = set()
        self._orders = BackgroundTasks(wire.failures.task_failed)
        self._engine: Engine
        self._coordinator: MigrationCoordinator

    def start(self, engine: Engine, coordinator: MigrationCoordinator) -> None:
        self._engine, self._coordinator = engine, coordinator

    async def close(self) -> None:
        await self._orders.cancel()

    def on_order(self, order: MoveOut) -> None:
        """Carries out an order of the scheduler: chooses a running request and moves it."""
        if len(self._orders) >= MAX_ORDERS:
            self._reporter.refuse_order("too_many", f"{MAX_ORDERS} are in progress")
            self._decided()
        else:
            self._orders.start(self._move_out(order))

    async def _move_out(self, order: MoveOut) -> None:
        chosen = None
        try:
            chosen = await self._choose(order)
        finally:
            self._decided()
        if chosen is None:
            return
        destination = InstanceId(order.destination.instance_id)
        try:
            record = await self._coordinator.migrate(chosen, destination, order.reason)
        except MigrationError as error:
            code = error.refusal.code
            logger.info("request %s: %s did not happen (%s): %s", chosen, order.reason, code, error)
        else:
            if not record.committed:
                self._pass_over(chosen, destination)

    def _pass_over(self, request_id: RequestId, destination: InstanceId) -> None:
        """Orders to this destination choose others for a while: a policy would choose this one again."""
        refused = (request_id, destination)
        self._passed_over.add(refused)
        asyncio.get_running_loop().call_later(REFUSED_MOVE_S, self._passed_over.discard, refused)

    async def _choose(self, order: MoveOut) -> RequestId | None:
        destination = order.destination
        if not self._members.has_peer(destination.instance_id):
            why = f"{destination.instance_id} is no other instance"  # any more: the scheduler learns it later
            self._reporter.refuse_order("destination", why, logging.INFO)
            return None
        running = await self._engine.running_requests()
        requests = [
            request
            for request in running
            if not self._coordinator.is_leaving(request.request_id)
            and (request.request_id, InstanceId(destination.instance_id)) not in self._passed_over
        ]
        chosen = self._selector.select(order.selection, requests, self._reporter.load(), destination)
        self._reporter.refused_orders["policy"] = self._selector.num_refused
        return None if chosen is None else chosen.request_id

    def _decided(self) -> None:
        """The next report shows the scheduler that it need not count the order as pending any more."""
        self._reporter.moves_decided += 1
        self._reporter.report_soon()

    async def move(self, sender: str, request: MoveRequest) -> MigrationRecord:
        """Serves a `MoveRequest`."""
        try:
            return await self._coordinator.migrate(
                request.request_id, request.destination, "manual", blocking=request.blocking
            )
        except (SourceGoneError, DestinationRefusedError) as error:
            return MigrationRecord(
                request_id=request.request_id,
                source=InstanceId(self._name),
                destination=request.destination,
                reason="manual",
                refusal=error.refusal,
            )

    def on_ended(self, record: MigrationRecord) -> None:
        """Logs an ended migration (committed hand-offs at DEBUG) and reports it to all API servers."""
        if record.refusal is None:
            outcome = f"committed, {record.blocks} blocks in {record.stages} stages"
        else:
            outcome = f"did not happen ({record.refusal.code}): {record.why}"
        logger.log(
            logging.DEBUG if record.committed and record.reason == "handoff" else logging.INFO,
            "request %s: %s %s -> %s %s",
            record.request_id,
            record.reason,
            self._name,
            record.destination,
            outcome,
        )
        for api_server in self._members.api_servers:
            self._wire.send(api_server, MigrationEnded(record))
        self._reporter.report_soon()
