"""Reports an instance's requests to their API servers, so that a lost message is noticed on both sides."""

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from migration.engine_interface import Engine, HeldByClient, HeldRequest
from migration.messages import RequestId
from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.messages import AddRequest, RequestReport
from pd_serve.comm.timing import API_SERVER_LEASE_S, REQUEST_REPORT_INTERVAL_S

#: Maximum number of received requests (with their epochs) that are kept, to notice a second delivery.
MAX_RECEIVED = 10_000


class ReportPublisher(Protocol):
    """Sends reports to token endpoints, in order with the tokens. Called on the thread that sends tokens."""

    def report(self, client: str, report: RequestReport) -> None:
        """Sends a report to the token endpoint `client`."""

    def retain(self, clients: Collection[str]) -> None:
        """Frees everything that is kept for other clients."""


class RequestReporter:
    """Reports the requests of an instance at every `report_soon`.

    Attributes:
        number: Number of the last report.
        num_orphans_ended: Requests ended because no API server has adopted them.
    """

    def __init__(
        self, members: MembershipView, publisher: ReportPublisher, tasks: BackgroundTasks, orphan_s: float
    ) -> None:
        self.number = self.num_orphans_ended = 0
        self._orphan_s = orphan_s
        self._members = members
        self._publisher = publisher
        self._tasks = tasks
        self._heartbeats: dict[str, int] = {}
        #: Requests that the engine does not have yet, by client.
        self._adding: dict[str, dict[tuple[RequestId, int], HeldRequest]] = {}
        self._received: OrderedDict[tuple[RequestId, int], None] = OrderedDict()
        self._reporting: asyncio.Task[None] | None = None
        self._absent: dict[str, int] = {}  # reports since an API server has left, by client

    def on_heartbeat(self, api_server: str, number: int) -> None:
        self._heartbeats[api_server] = number

    def client_left(self, client: str) -> None:
        """Its API server is no member any more."""
        self._absent.setdefault(client, 0)

    def adding(self, message: AddRequest) -> bool:
        """A request has been received, and is reported from now on. Returns False if it comes twice."""
        key = message.request_id, message.epoch
        if key in self._received:
            return False
        self._received[key] = None
        if len(self._received) > MAX_RECEIVED:
            self._received.popitem(last=False)
        held = HeldRequest(message.request_id, message.epoch, len(message.output_token_ids))
        self._adding.setdefault(message.client, {})[key] = held
        return True

    def added(self, message: AddRequest) -> None:
        """The engine has the request, or has refused it."""
        del self._adding[message.client][message.request_id, message.epoch]
        if not self._adding[message.client]:
            del self._adding[message.client]

    def report_soon(self, engine: Engine) -> None:
        """Reports between two steps. Does nothing while the last report waits for the end of a step."""
        if self._reporting is None or self._reporting.done():
            self._reporting = self._tasks.start(self._report(engine))

    async def _report(self, engine: Engine) -> None:
        # What has been received now is in the engine at the visit, or in `adding`.
        servers = {name: info.token_endpoint for name, info in self._members.api_servers.items()}
        self._heartbeats = {name: n for name, n in self._heartbeats.items() if name in servers}
        heartbeats = dict(self._heartbeats)
        adding = {client: list(requests.values()) for client, requests in self._adding.items()}
        number = self.number + 1

        def visit(held: HeldByClient) -> dict[str, int]:
            for name, client in servers.items():
                requests = held.get(client, []) + adding.get(client, [])
                self._publisher.report(client, RequestReport(number, heartbeats.get(name, 0), requests))
            clients = held.keys() | adding.keys()
            self._publisher.retain(clients | set(servers.values()))
            unknown = clients - set(servers.values())
            return {client: sum(not r.finished for r in held.get(client, ())) for client in unknown}

        unknown = await engine.visit_requests(visit)
        self.number = number
        await self._end_abandoned(engine, unknown, set(servers.values()))

    async def _end_abandoned(self, engine: Engine, held: dict[str, int], servers: set[str]) -> None:
        """Ends the requests of API servers that have been no members for some time.

        They may be orphans, or were in transit when their API server was taken out of the membership. Time
        is counted in reports, so that a suspension of this process does not count.

        Args:
            held: Number of unfinished requests by client, of API servers that are no members.
        """
        if not held and not self._absent:
            return
        limit_s = self._orphan_s or API_SERVER_LEASE_S
        absent = {client: self._absent.get(client, 0) + 1 for client in self._absent.keys() | held.keys()}
        # Not forgotten at once: requests may still move here.
        self._absent = {
            client: reports
            for client, reports in absent.items()
            if client not in servers and (client in held or reports * REQUEST_REPORT_INTERVAL_S < 2 * limit_s)
        }
        for client, reports in self._absent.items():
            if client in held and reports * REQUEST_REPORT_INTERVAL_S > limit_s:
                self.num_orphans_ended += held[client]
                await engine.abort_client(client)
