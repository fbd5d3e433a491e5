"""The API server's side of the cluster: where every request is, its tokens in order, its migrations.

It dispatches new requests by the latest loads, follows each request's owner by the tokens' epochs, and
recomputes requests elsewhere when their owner dies. All of it on one event loop.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from migration.messages import RequestId
from migration.record import MigrationRecord
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    InstanceInfo,
    LoadReport,
    MigrateRequest,
    MigrationEnded,
    Reply,
    SchedulerReport,
    StartInstance,
    StopInstance,
)
from pd_serve.comm.outputs import OutputBatch, RequestOutput
from pd_serve.comm.roster import InstanceRegistry
from pd_serve.comm.wire import Wire
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.manual_migration import ManualMigration, MigrationMode
from pd_serve.frontend.output_codec import OutputCodec
from pd_serve.frontend.snapshot import instance_row
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.frontend.tracked_request import TrackedRequest
from pd_serve.observe.cluster_reports import ClusterReports
from pd_serve.observe.recorder import RequestRecorder
from pd_serve.observe.timeline import ObservedMigration
from router.dispatch import can_start
from router.dispatcher import Dispatcher
from router.request import NewRequest
from router.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

#: How often a request is recomputed because its owner died, before the client gets an error.
MAX_RECOMPUTES = 3

#: How long to leave a request where it is after asking for its hand-off once more.
PLACE_AGAIN_S = 0.25


class RequestTracker(InstanceRegistry):
    """The requests of one API server.

    Args:
        codec: Knows the encoding of the engines' outputs.
        deliver: Takes batches of outputs, every token exactly once and in order.
        block_tokens: Tokens per KV block.
        num_slots, owns, on_scaling, on_decided, on_silent: See `Roster`.
        clock: The time that deliveries are measured by, in seconds.
        dispatcher: Decides where requests start and are handed off to.
        recorder: Told what happens to every request.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        codec: OutputCodec,
        deliver: Callable[[OutputBatch], None],
        *,
        block_tokens: int,
        num_slots: int,
        owns: bool = True,
        clock: Callable[[], float] = time.monotonic,
        on_scaling: Callable[[StartInstance | StopInstance], None] = lambda wanted: None,
        on_decided: Callable[[SchedulerReport], None] = lambda report: None,
        on_silent: Callable[[str], object] | None = None,
        dispatcher: Dispatcher | None = None,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self._dispatcher = dispatcher or Dispatcher()
        super().__init__(
            name,
            wire,
            on_tokens=self._on_tokens,
            num_slots=num_slots,
            owns=owns,
            waiting=lambda: self._line.demand,
            is_claimed=self._has_requests_at,
            on_scaling=on_scaling,
            on_decided=on_decided,
            on_silent=on_silent,
            book=self._dispatcher.loads,
        )
        self._codec = codec
        self._recorder = recorder or RequestRecorder()
        self._deliver = deliver
        self._clock = clock
        #: Told (request, instance, tokens so far, time in s) at every delivery; for measurements.
        self.observer: Callable[[RequestId, str, int, float], None] | None = None
        self._block_tokens = block_tokens
        self._loop = asyncio.get_running_loop()
        self._line = WaitingLine(self._dispatcher)
        self._routes: dict[RequestId, TrackedRequest] = {}
        self._by_hand = ManualMigration(self._routes, self.instances)
        self._num_waiting = 0
        self._migrations: dict[str, Counter[str]] = {"handoff": Counter(), "manual": Counter()}
        self.reports = ClusterReports(lambda: self._line.demand, lambda: len(self._routes), self._loop.time)

    def join(self, info: InstanceInfo) -> None:
        super().join(info)
        self.reports.joined(info, self.instances.slot_of(info.instance_id))
        self._recorder.instance_joined(info)

    def leave(self, instance_id: str) -> bool:
        """An instance is dead or stopped: its requests are recomputed elsewhere."""
        if not super().leave(instance_id):
            return False
        self.reports.left(instance_id)
        for route in list(self._routes.values()):
            # With a gap, tokens of a former owner may have been lost with it.
            if instance_id in (route.ledger.owner, route.committed_to) or route.ledger.has_gap:
                self._recompute(route, instance_id)
        if self._line and not self._dispatcher.is_serving:
            for request_id in list(self._line):
                logger.error("request %s: there is no instance left that it could wait for", request_id)
                self._fail(self._routes[RequestId(request_id)])
        return True

    def _has_requests_at(self, instance_id: str) -> bool:
        return any(instance_id in (route.ledger.owner, route.committed_to) for route in self._routes.values())

    # ---- requests

    def submit(
        self,
        request_id: str,
        payload: list[bytes],
        request: NewRequest,
        *,
        max_tokens: int | None = None,
        name: str = "",
        trace_headers: Mapping[str, str] | None = None,
    ) -> None:
        """Starts a request on a prefill instance.

        Args:
            payload: The request as its engine decodes it.
            max_tokens: How many it may generate, if that is known: for one, no other instance is needed.
            name: What its client calls it.
            trace_headers: The client's `traceparent` and the like.

        Raises:
            EngineDeadError: no live instance takes new requests.
        """
        route = TrackedRequest(RequestId(request_id), payload, request, TokenLedger(""), max_tokens)
        self._recorder.issued(request_id, self._clock(), request, name=name, trace_headers=trace_headers)
        try:
            placed = self._place(route, epoch=0, may_wait=True)
        except EngineDeadError:
            self._recorder.ended(request_id, "error", self._clock())
            raise
        if not placed:
            self._line.add(request_id, request, self._loop.time())
        self._routes[route.request_id] = route
        self._num_waiting += 1

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests wherever they are. Unknown ids are ignored."""
        by_owner: dict[str, list[RequestId]] = {}
        for request_id in request_ids:
            route = self._routes.get(RequestId(request_id))
            if route is not None:
                by_owner.setdefault(route.ledger.owner, []).append(route.request_id)
                self._end(route, "abort")
        for owner, owned in by_owner.items():
            self.instances.send(owner, AbortRequests(owned))

    def _place(self, route: TrackedRequest, epoch: int, *, may_wait: bool = False) -> bool:
        """Sends a request to where it starts. False: it has to wait for room, and may.

        Raises:
            EngineDeadError: no live instance takes new requests.
        """
        request = route.request
        if route.ledger.token_ids:  # computed again, with what has been generated
            num_tokens = request.prompt_tokens + len(route.ledger.token_ids)
            request = NewRequest(num_tokens, request.priority, request.prefix_keys)
        instance_id = self._dispatcher.dispatch(request, may_wait=may_wait)
        if instance_id is None:
            if may_wait and self._dispatcher.is_serving:
                return False
            raise EngineDeadError("no live instance takes new requests; see GET /cluster")
        route.ledger.owner = instance_id
        self._recorder.dispatched(route.request_id, instance_id, self._book[instance_id].role, self._clock())
        handoff: list[str] | None = None
        if self._book[instance_id].role == "prefill" and not route.ends_with_prefill:
            num_blocks = self._blocks_of(route)
            handoff = self._dispatcher.destinations(num_blocks, request.priority)
            if handoff:
                route.destination = handoff[0]
                self._book.expect(handoff[0], route.request_id, num_blocks)
        message = AddRequest(
            route.request_id, self.instances.token_endpoint, epoch, handoff, list(route.ledger.token_ids)
        )
        self.instances.send(instance_id, message, route.payload)
        return True

    def _place_waiting(self, instance_id: str) -> None:
        """An instance has reported: there may be room for those who wait."""
        for request_id in self._line.take(instance_id, self._loop.time()):
            route = self._routes[RequestId(request_id)]
            try:
                self._place(route, epoch=route.ledger.epoch)
            except EngineDeadError as error:
                logger.error("request %s: %s", request_id, error)
                self._fail(route)

    def _blocks_of(self, route: TrackedRequest) -> int:
        return -(-(route.request.prompt_tokens + len(route.ledger.token_ids) + 1) // self._block_tokens)

    def _recompute(self, route: TrackedRequest, lost: str) -> None:
        """Continues a request that was lost with an instance, from the tokens that the client has."""
        route.recomputes += 1
        self._recorder.lost(route.request_id, lost, self._clock())
        route.committed_to = ""
        self._book.settled(route.destination, route.request_id)
        epoch = route.ledger.take_over("")
        try:
            if route.recomputes > MAX_RECOMPUTES:
                raise EngineDeadError(f"its instances died {route.recomputes} times")
            self._place(route, epoch)
        except EngineDeadError as error:
            logger.error("request %s: lost with %s: %s", route.request_id, lost, error)
            self._fail(route)
        else:
            logger.warning(
                "request %s: %s died, %s recomputes it from token %d",
                route.request_id,
                lost,
                route.ledger.owner,
                len(route.ledger.token_ids),
            )

    def _fail(self, route: TrackedRequest) -> None:
        self._end(route, "error")
        self._deliver(self._codec.failed(route.request_id))

    def _end(self, route: TrackedRequest, outcome: str) -> None:
        del self._routes[route.request_id]
        tokens, longest_gap_s = len(route.ledger.token_ids), route.ledger.longest_gap_s
        self._recorder.ended(
            route.request_id, outcome, self._clock(), tokens=tokens, longest_gap_s=longest_gap_s
        )
        if not route.ledger.token_ids:
            self._num_waiting -= 1
            if not route.ledger.owner:
                self._line.discard(route.request_id)
        self._book.settled(route.destination, route.request_id)
        for waiter in route.moved:
            if not waiter.done():
                waiter.set_result(None)

    # ---- tokens

    def _on_tokens(self, frames: list[bytes]) -> None:
        header, outputs = self._codec.decode(frames)
        if header.instance_id not in self.instances:
            # Its requests are recomputed, or will be when the instance that has sent them there says so;
            # a late token would make it the owner once more.
            return
        now, source = self._clock(), header.instance_id
        deliver: list[RequestOutput] = []
        last_token_at: dict[float, int] = {}  # of most outputs of a step it is the same
        stale: list[tuple[RequestId, int | None]] = []
        for output, (epoch, index) in zip(outputs.outputs, header.spans, strict=True):
            route = self._routes.get(output.request_id)
            if (
                route is not None
                and (before := route.ledger.extend(source, epoch, index, output, now)) is not None
            ):
                deliver.append(output)
                last_token_at[before] = last_token_at.get(before, 0) + 1
                if self.observer is not None:
                    self.observer(route.request_id, source, index + len(output.new_token_ids), now)
                continue
            if route is None:
                if output.finish_reason is None:
                    stale.append((RequestId(output.request_id), None))
                continue
            ledger = route.ledger
            waiting, moves, before = not ledger.token_ids, ledger.num_moves, ledger.last_token_at
            heard = ledger.heard_epoch
            ready, is_stale = ledger.accept(source, epoch, index, output, now)
            deliver += ready
            if is_stale:
                stale.append((route.request_id, epoch + 1))  # the copy that has said this, no later one
            if waiting and ledger.token_ids:
                self._num_waiting -= 1
            if ledger.num_moves != moves:
                self._book.settled(route.destination, route.request_id)
                if ledger.owner == route.committed_to:
                    route.committed_to = ""
            if ready and before:
                last_token_at[before] = last_token_at.get(before, 0) + 1
            if ledger.heard_epoch != heard:
                self._first_heard(route, outputs, output, now)
            if ready and self.observer is not None:
                self.observer(route.request_id, source, len(ledger.token_ids), now)
            if route.moved and ledger.owner_has_spoken:
                for waiter in route.moved:
                    if not waiter.done():
                        waiter.set_result(None)
                route.moved.clear()
            if ledger.finished:
                self._end(route, str(ready[-1].finish_reason))
        for request_id, below_epoch in stale:
            self.instances.send(source, AbortRequests([request_id], below_epoch))
        if last_token_at:
            self._recorder.token_gaps({now - at: number for at, number in last_token_at.items()})
        if deliver or outputs.scheduler_stats is not None:
            outputs.outputs = deliver
            outputs.engine_index = self.instances.slot_of(source)
            self._deliver(outputs)

    def _first_heard(
        self, route: TrackedRequest, outputs: OutputBatch, output: RequestOutput, now: float
    ) -> None:
        """The first token of an owner has been delivered."""
        owner = route.ledger.owner
        load = self._book.get(owner)
        self._recorder.first_token_from(
            route.request_id,
            owner,
            load.role if load is not None else "",
            now,
            gap_s=route.ledger.last_gap_s,
            prefill_s=self._codec.prefill_s(outputs, output),
        )

    # ---- messages from instances

    def _on_load(self, instance_id: str, report: LoadReport) -> None:
        self.reports.on_load(instance_id, report)
        if self._line:
            self._place_waiting(instance_id)
        for request_id in report.stranded:
            self._place_stranded(instance_id, request_id)

    def _on_message(self, sender: str, message: Any) -> None:
        match message:
            case SchedulerReport():
                self.reports.on_scheduler(message)
                super()._on_message(sender, message)
            case MigrationEnded(call_id="", record=record):
                self._migrations.setdefault(record.reason, Counter())[record.outcome] += 1
                self._recorder.migrated(record, self._clock())
                if record.committed:
                    self._on_committed(record)
                else:
                    self._book.settled(record.destination, record.request_id)
            case MigrationEnded(call_id=call_id) | Reply(call_id=call_id):
                if isinstance(message, Reply) and call_id.startswith("add:"):
                    route = self._routes.get(RequestId(call_id.removeprefix("add:")))
                    if route is not None:
                        logger.error("request %s: %s", route.request_id, message.error)
                        self._fail(route)
                else:
                    self.instances.answered(message)
            case _:
                super()._on_message(sender, message)

    def _on_committed(self, record: MigrationRecord) -> None:
        """The request has left an instance. Until it speaks from the next one, that may die unnoticed."""
        route = self._routes.get(record.request_id)
        if route is None or record.source not in (route.ledger.owner, route.committed_to):
            return
        if record.destination in self.instances:
            route.committed_to = record.destination
        else:
            self._recompute(route, record.destination)

    def _place_stranded(self, source: str, request_id: RequestId) -> None:
        """A request waits on a prefill instance for a decode instance that has room."""
        route = self._routes.get(request_id)
        if (
            route is None
            or route.ledger.owner != source
            or self._loop.time() < route.placed_at + PLACE_AGAIN_S
        ):
            return
        num_blocks = self._blocks_of(route)
        for destination in self._dispatcher.destinations(num_blocks, route.request.priority)[:1]:
            if self._book.free_blocks(destination) > num_blocks:
                route.placed_at = self._loop.time()
                self._book.settled(route.destination, request_id)
                route.destination = destination
                self._book.expect(destination, request_id, num_blocks)
                self.instances.send(source, MigrateRequest("", request_id, destination, "handoff"))

    # ---- ClusterView

    def find_requests(self, name: str) -> list[dict[str, Any]]:
        found = self._recorder.find(name)
        for request in found:
            if (route := self._routes.get(request["id"])) is not None:
                request["output_tokens"] = len(route.ledger.token_ids)
                request["longest_gap_s"] = round(route.ledger.longest_gap_s, 6)
        return found

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_live(self) -> int:
        return sum(can_start(load) for load in self._book)

    def snapshot(self) -> dict[str, Any]:
        instances = [instance_row(info, self._book.get(info.instance_id)) for info in self.instances]
        migrations = {
            reason: {"committed": counts["committed"], "aborted": counts["aborted"]}
            for reason, counts in self._migrations.items()
        }
        return {
            "instances": instances,
            "waiting_line": self._line.demand._asdict(),
            "migrations": migrations,
        }

    async def migrate(
        self, request_id: str, destination: str, mode: MigrationMode = "live"
    ) -> ObservedMigration:
        return await self._by_hand.migrate(request_id, destination, mode)

    async def check_integrity(self) -> list[str]:
        """Asks every instance, until nothing is wrong or what is wrong stays so for a while."""
        deadline = self._loop.time() + 3.0
        while True:
            problems = await self._problems()
            if not problems or self._loop.time() > deadline:
                return problems
            await asyncio.sleep(0.1)

    async def _problems(self) -> list[str]:
        problems: list[str] = []
        for found in (await self.instances.call_all("check_integrity")).values():
            problems += found
        ours = self.instances.token_endpoint
        for instance_id, live in (await self.instances.call_all("live_requests", ours)).items():
            if orphans := sorted(set(live) - set(self._routes)):
                problems.append(f"{instance_id}: holds requests that nobody waits for: {orphans}")
        if self._num_waiting != sum(not route.ledger.token_ids for route in self._routes.values()):
            problems.append("the count of waiting requests is off")
        return problems
