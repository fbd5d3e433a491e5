"""The API server's part of the control plane: receives its messages, tracks requests, serves `/cluster`."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.cached_blocks import CachedBlocks
from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.membership import ApiServerInfo, ApiServerStatus, InstanceInfo, Membership, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import InstanceStats, LoadReport, MigrationEnded, RequestFailed, ToApiServer
from pd_serve.comm.outputs import OutputBatch
from pd_serve.comm.requests import (
    Call,
    DrainInstance,
    FindRequests,
    ManualMigration,
    MigrateByName,
    RestartInstances,
    ScalePools,
)
from pd_serve.comm.rpc import Answer, RpcServer
from pd_serve.comm.timing import HEARTBEAT_S, REQUEST_REPORT_INTERVAL_S
from pd_serve.errors import MigrationRefusedError, RefusalCode, UnknownTargetError
from pd_serve.frontend.accounts import Accounts
from pd_serve.frontend.adoption import Adoption
from pd_serve.frontend.api_servers import ApiServers
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.integrity import IntegrityChecks, IntegrityWatch
from pd_serve.frontend.lora_adapters import OfferedAdapters
from pd_serve.frontend.manager_client import ManagerClient
from pd_serve.frontend.manual_migration import ManualMigrations, MigrationMode
from pd_serve.frontend.outage import Outage
from pd_serve.frontend.output_codec import OutputCodec
from pd_serve.frontend.placement import RequestPlacement
from pd_serve.frontend.reconciler import Reconciler
from pd_serve.frontend.request_tracker import RequestTracker
from pd_serve.frontend.snapshot import ClusterSnapshot, InstanceSnapshot, TargetsSnapshot, WaitingRequests
from pd_serve.frontend.token_stream import TokenStream
from pd_serve.observe.cluster_report import ClusterReport
from pd_serve.observe.recorder import RequestRecorder
from router.dispatch import candidates
from router.dispatcher import Dispatcher
from router.request import NewRequest


class Frontend:
    """Implements `pd_serve.api.cluster_view.ClusterView`. Runs on one event loop until `close`.

    Args:
        wire: Has the API server's name. `close` closes it.
        find_manager: See `ManagerClient`.
        codec: Decodes the engines' outputs.
        deliver: Receives batches of outputs, every token exactly once and in order.
        dispatcher: Decides where requests start and where they are handed off to.
        num_slots: See `Instances`.
        orphan_s: See `Adoption`.
        accounts: Limits and shares of API keys; None: there are none.
        clock: Clock of the recorded times, in seconds.
        on_integrity: Called every minute with the violated invariants of the cluster; None: no such checks.

    Attributes:
        tokens: Has an `observer`, for measurements.
        adoption: Submits requests that another API server may have had.
        api_servers: All API servers, and what the others have.
        server: Serves the calls of other API servers.
        internal_ids: Returns the engines' ids of a request by the client's id; set by the engine client.
    """

    def __init__(
        self,
        wire: MessageWire,
        find_manager: Callable[[], Awaitable[str]],
        codec: OutputCodec,
        deliver: Callable[[OutputBatch], None],
        dispatcher: Dispatcher,
        *,
        num_slots: int,
        orphan_s: float = 0.0,
        accounts: Accounts | None = None,
        recorder: RequestRecorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_integrity: Callable[[list[str]], None] | None = None,
    ) -> None:
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._members = MembershipView(wire.name, wire)
        self._stats: dict[str, InstanceStats] = {}
        self._stranded: dict[str, int] = {}
        self._joined = ""
        self.internal_ids: Callable[[str], list[str]] = lambda request_id: [request_id]
        self._recorder = recorder = recorder or RequestRecorder()
        self.instances = Instances(wire, self._members, dispatcher.loads, num_slots)
        endpoint = wire.listen_for_frames(lambda frames: self.tokens.on_frames(frames))
        self._accounts = accounts = accounts or Accounts()
        self._placement = placement = RequestPlacement(wire, endpoint, dispatcher, recorder, clock, accounts)
        seen = self.instances
        self._outage = Outage(
            lambda: placement.is_serving,
            seen.num_staying,
            lambda: self._manager.state,
            lambda: self._reconciler.silence_s,
            self._loop.time,
        )
        self.requests = RequestTracker(
            wire, seen, placement, codec, deliver, recorder, clock, accounts, self._outage
        )
        requests = self.requests.requests
        self._reconciler = Reconciler(
            wire, self.instances, requests, self.requests, recorder, lambda: self._manager.num_heartbeats
        )
        self.tokens = TokenStream(
            wire,
            self.instances,
            requests,
            codec,
            deliver,
            recorder,
            self.requests,
            clock,
            self._reconciler.on_report,
        )
        self.adoption = Adoption(endpoint, self.instances, self.requests, orphan_s)
        self._manual = ManualMigrations(wire, requests, self.instances, placement)
        self._manager = ManagerClient(
            wire,
            self._members,
            self.instances.calls,
            find_manager,
            lambda: placement.demand,
            self.requests.is_unused,
        )
        self.lora_adapters = OfferedAdapters(self._manager)
        self.api_servers = ApiServers(wire, self._members, self.instances.calls)
        self.api_servers.counts |= {
            "requests": lambda: len(requests),
            "waiting": lambda: self.num_waiting,
            "line_requests": lambda: placement.demand.requests,
            "line_tokens": lambda: placement.demand.tokens,
        }
        calls: dict[type, Any] = {MigrateByName: self._serve_migrate, FindRequests: self._serve_find_requests}
        self.server = RpcServer(wire, calls)
        address = wire.listen(ToApiServer, self._on_message, gathers=True)
        self._manager.open(ApiServerInfo(address, endpoint, pid=os.getpid()))
        self._tasks = BackgroundTasks(wire.failures.task_failed)
        self._tasks.start(self._reconcile())
        self._integrity = IntegrityChecks(
            wire, self.instances, self.requests, endpoint, lambda: self._manager.state
        )
        if on_integrity is not None:
            self._tasks.start(IntegrityWatch(self._integrity.suspicions, on_integrity).run())

    async def close(self) -> None:
        await self._tasks.cancel()
        await self._manager.close()
        await self.api_servers.close()
        await self.server.close()
        self.requests.close()
        await self._wire.close()

    async def wait_for_instances(self) -> list[InstanceInfo]:
        """Returns the instances as soon as there are any and all of them have reported their load."""
        await self.instances.wait_for_reports()
        return list(self.instances)

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)
            try:
                self._reconciler.check(REQUEST_REPORT_INTERVAL_S)
                self.requests.bound_waits()
                self._accounts.charge(self.requests.requests.values())
            except Exception as error:  # the next check has to come, whatever it is
                self._wire.failures.record("reconciling", error)

    # ---- messages

    def _on_message(self, sender: str, message: Any, payload: Sequence[bytes]) -> None:
        self._reconciler.on_message(sender)
        match message:
            case LoadReport(load=load):
                if sender in self.instances:
                    self.instances.cached_blocks.on_load(sender, message.cache_reports)
                    self._stranded[sender] = len(message.stranded)
                    if message.stats is not None:
                        self._stats[sender] = message.stats
                    if self._reconciler.on_load(sender, message.request_reports):
                        self.instances.report(load)
                        self.requests.on_load(sender, message)
                    else:
                        self.instances.set_unreachable(sender)
            case CachedBlocks():
                self.instances.cached_blocks.on_report(sender, message)
            case MigrationEnded(record=record):
                self.requests.on_migration_ended(record)
            case RequestFailed():
                self.requests.on_request_failed(message)
            case Membership():
                self._on_membership(message)
            case ClusterState():
                self._manager.on_state(message)
            case ApiServerStatus():
                self.api_servers.on_status(sender, message)
            case Answer():
                self.instances.calls.on_answer(sender, message)
            case Call(call_id=call_id, request=request):
                self.server.on_call(sender, call_id, request)

    def _on_membership(self, message: Membership) -> None:
        leaving = self._members.latest.leaving if self._members.latest is not None else []
        change = self._members.update(message)
        if change is None:
            return
        self._note_own_membership(message)
        self._accounts.limits.num_servers = max(len(message.api_servers), 1)
        self.api_servers.on_left(change.api_servers_left)
        self.lora_adapters.on_membership(message.lora_adapters)
        for instance_id in change.left:
            self.instances.remove(instance_id)
            self._reconciler.instance_left(instance_id)
            self._stats.pop(instance_id, None)
            self._stranded.pop(instance_id, None)
            self._recorder.instance_left(instance_id)
        for info in change.joined:
            self.instances.add(info)
            self._recorder.instance_joined(info)
        for instance_id in change.left:
            self.requests.instance_left(instance_id, died=instance_id not in leaving)

    def _note_own_membership(self, message: Membership) -> None:
        """The instances have ended all requests here if the manager has dropped this API server meanwhile."""
        info = message.api_servers.get(self._wire.name)
        if info is None or info.joined == self._joined:
            return
        if self._joined:
            ended = list(self.requests.requests.values())
            # Not before the instances know that it is back: they would end what is recomputed, too.
            self._loop.call_later(HEARTBEAT_S, self.requests.recompute, ended)
        self._joined = info.joined

    # ---- ClusterView

    @property
    def num_waiting(self) -> int:
        return self.requests.num_waiting

    def first_token_s(self, request: NewRequest, arriving_tokens: int) -> float | None:
        return self.requests.first_token_s(request, arriving_tokens)

    @property
    def num_waiting_elsewhere(self) -> int:
        return self.api_servers.elsewhere("waiting")

    @property
    def num_live(self) -> int:
        return 0 if self._outage.hears_none else len(candidates(self.instances.loads))

    @property
    def takes_requests(self) -> bool:
        return self._outage.takes_requests()

    def snapshot(self) -> ClusterSnapshot:
        seen, stats = self.instances, self._stats.get
        instances = [
            InstanceSnapshot.of(info, seen.load_of(name), stats(name), unreachable=name in seen.unreachable)
            for name, info in self._members.instances.items()
        ]
        snapshot = ClusterSnapshot(
            instances=instances,
            waiting_line=self._waiting_line,
            targets=TargetsSnapshot.of(*map(self.api_servers.everywhere, ("slo_requests", "slo_met"))),
            api_servers=self.api_servers.snapshot(),
            migrations={
                reason: {"committed": counts["committed"], "aborted": counts["aborted"]}
                for reason, counts in self.requests.migrations.items()
            },
        )
        state, is_alive = self._manager.state, self._manager.is_alive
        return snapshot if state is None else snapshot.with_state(state, is_alive=is_alive)

    @property
    def _waiting_line(self) -> WaitingRequests:
        """Of all API servers."""
        others, own = self.api_servers.elsewhere, self._placement.demand
        return WaitingRequests(own.requests + others("line_requests"), own.tokens + others("line_tokens"))

    def totals(self) -> tuple[int, int]:
        """Requests of the whole cluster that run, and that wait."""
        loads = list(self.instances.loads)
        waiting = sum(load.waiting for load in loads) + self._waiting_line.requests
        return sum(load.running for load in loads), waiting

    def report(self) -> ClusterReport:
        """For `/metrics`."""
        return ClusterReport(
            loads=list(self.instances.loads),
            slots=self.instances.slots_by_instance(),
            stats=self._stats,
            stranded=self._stranded,
            waiting=self._placement.demand,
            num_running=len(self.requests.requests),
            num_unsent=len(self._wire.unsent),
            state=self._manager.state,
            message_errors=dict(self._wire.failures.by_kind),
            immovable={i.instance_id for i in self.instances if i.engine.no_migration is not None},
        )

    async def migrate(
        self, request_id: str, destination: str, mode: MigrationMode = "live"
    ) -> ManualMigration:
        try:
            return await self._manual.migrate(request_id, destination, mode)
        except UnknownTargetError:
            if destination not in self.instances:
                raise
        return await self._manager.call(MigrateByName(request_id, destination))  # of another API server

    async def find_requests(self, name: str) -> list[dict[str, Any]]:
        return self.requests.find(name) or await self._manager.call(FindRequests(name))

    async def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        await self._manager.call(DrainInstance(instance_id, draining, stop))

    async def scale(self, sizes: dict[str, int]) -> None:
        await self._manager.call(ScalePools(sizes))

    async def restart(self, *, cancel: bool = False) -> None:
        await self._manager.call(RestartInstances(cancel))

    async def check_integrity(self) -> list[str]:
        return await self._integrity.check()

    # ---- calls of other API servers, forwarded by the manager

    async def _serve_migrate(self, sender: str, request: MigrateByName) -> ManualMigration:
        ids = self.internal_ids(request.request_id)
        if len(ids) > 1:
            text = f"{request.request_id} names {len(ids)} running requests"
            raise MigrationRefusedError(text, RefusalCode.AMBIGUOUS_REQUEST)
        return await self._manual.migrate(ids[0] if ids else request.request_id, request.destination)

    async def _serve_find_requests(self, sender: str, request: FindRequests) -> list[dict[str, Any]]:
        return self.requests.find(request.name)
