"""Load reports of an instance: their contents, times and receivers."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable

from msgspec.structs import asdict

from migration.coordinator import MigrationCoordinator
from migration.messages import RequestId
from pd_serve.comm.leases import StepWatch
from pd_serve.comm.membership import MANAGER, SCHEDULER, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import InstanceStats, LoadReport
from pd_serve.comm.timing import (
    MAX_REPORT_INTERVAL_S,
    MAX_REPORTS_PER_S,
    PROGRESS_REPORT_INTERVAL_S,
    REPORT_INTERVAL_S,
    STATS_INTERVAL_S,
)
from pd_serve.instance.cached_blocks import CachedBlockReporter
from pd_serve.observe.process_stats import process_stats
from router.load import ROLES, EngineLoad, InstanceLoad, decisive, slow_blocks

logger = logging.getLogger(__name__)

#: Why an order of the scheduler is not carried out; see `InstanceStats.refused_orders`.
REFUSED_ORDERS = ("policy", "destination", "role", "too_many")

#: Time that the share of busy time is measured over, in seconds.
BUSY_OVER_S = 10.0


def report_interval_s(num_instances: int) -> float:
    """Minimum interval of an instance's load reports: the more instances, the longer."""
    return min(max(REPORT_INTERVAL_S, num_instances / MAX_REPORTS_PER_S), MAX_REPORT_INTERVAL_S)


class BusyShare:
    """Share of the latest time that an engine was in steps."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()  # (time, busy time until then)

    def share(self, now: float, busy_s: float) -> float:
        """The share over the last `BUSY_OVER_S`, or since the first call.

        Args:
            busy_s: Time in steps since the start of the engine.
        """
        if not self._seen or now > self._seen[-1][0]:
            self._seen.append((now, busy_s))
        while len(self._seen) > 2 and self._seen[1][0] <= now - BUSY_OVER_S:
            self._seen.popleft()
        since, before = self._seen[0]
        return min(max(busy_s - before, 0.0) / (now - since), 1.0) if now > since else 0.0


class LoadReporter:
    """Reports load to API servers and the scheduler; to the manager as a heartbeat, and while it drains.

    Args:
        stranded: Returns the stranded requests.
        request_reports: Returns the number of the last report of requests.
        cached_blocks: Reports what is in the prefix cache.
        orphans: Returns the numbers of adopted and of ended orphans.
        itl_target_s: Target of the time per token; 0 for none.

    Attributes:
        role: Present role of the instance.
        draining: The instance takes no new requests, and its requests move away.
        drained_by_operator: Only the operator can end the drain.
        requests_added: Number of new requests; shows API servers which dispatches a report includes.
        refused_orders: Orders of the scheduler that were not carried out, by reason.
        moves_decided: Number of handled orders to move; shows the scheduler which orders a report includes.
        step_watch: Tells the receivers of reports how long the engine's step in progress takes.
    """

    def __init__(
        self,
        name: str,
        role: str,
        wire: MessageWire,
        members: MembershipView,
        stranded: Callable[[], list[RequestId]],
        request_reports: Callable[[], int],
        cached_blocks: CachedBlockReporter,
        orphans: Callable[[], tuple[int, int]] = lambda: (0, 0),
        itl_target_s: float = 0.0,
    ) -> None:
        self.role = role
        self.draining = False
        self.drained_by_operator = False
        self._reported_state = (role, False)  # to the manager, which decides by it about the next drain
        self.requests_added = 0
        self.refused_orders = Counter(dict.fromkeys(REFUSED_ORDERS, 0))
        self.moves_decided = 0
        self.unmovable: dict[str, int] = {}
        self.step_watch = StepWatch()
        self._name = name
        self._wire = wire
        self._members = members
        self._stranded = stranded
        self._request_reports = request_reports
        self._cached_blocks = cached_blocks
        self._orphans = orphans
        self._itl_target_s = itl_target_s
        self._busy = BusyShare()
        self._loop = asyncio.get_running_loop()
        self._coordinator: MigrationCoordinator | None = None
        self._engine = EngineLoad(block_tokens=1)  # until the engine reports
        self._reported_at = 0.0
        self._stats_at = -STATS_INTERVAL_S
        self._due: asyncio.TimerHandle | None = None

    def start(self, coordinator: MigrationCoordinator) -> None:
        self._coordinator = coordinator

    def close(self) -> None:
        if self._due is not None:
            self._due.cancel()

    def set_role(self, role: str) -> None:
        """Takes the scheduler's order of a role. One that is unknown is refused."""
        if role not in ROLES:
            return self.refuse_order("role", f"there is no role {role!r}")
        self.role = role
        self.report_soon()

    def refuse_order(self, reason: str, why: str, level: int = logging.ERROR) -> None:
        """Counts an order of the scheduler that is not carried out; logs the first one for each reason.

        Args:
            level: ERROR for an order that no scheduler should give.
        """
        self.refused_orders[reason] += 1
        level = level if self.refused_orders[reason] == 1 else logging.DEBUG
        logger.log(level, "%s refuses an order of the scheduler: %s", self._name, why)

    def set_draining(self, draining: bool, *, by_operator: bool) -> None:
        if by_operator:
            self.drained_by_operator = draining
        self.draining = draining or self.drained_by_operator
        self.report_soon()

    def on_unmovable(self, numbers: dict[str, int]) -> None:
        """Takes the engine's number of requests that cannot move, by reason."""
        self.unmovable = numbers

    def on_engine_load(self, load: EngineLoad) -> None:
        """Takes the engine's load after a step."""
        before, self._engine = self._engine, load
        changed = decisive(load) != decisive(before)
        if changed or self._loop.time() - self._reported_at >= PROGRESS_REPORT_INTERVAL_S:
            self.report_soon()

    def load(self) -> InstanceLoad:
        coordinator = self._coordinator
        # All fields in their order, which takes half the time of some of them.
        return InstanceLoad(
            instance_id=self._name,
            role=self.role,
            migrating_in=coordinator.num_incoming if coordinator else 0,
            migrating_out=coordinator.num_outgoing if coordinator else 0,
            draining=self.draining,
            drained_by_operator=self.drained_by_operator,
            requests_added=self.requests_added,
            moves_decided=self.moves_decided,
            step_s=self.step_watch.step_s,
            hangs=self.step_watch.hangs,
            block_copy_s=coordinator.block_copy_s if coordinator else 0.0,
            far_block_copy_s=coordinator.far_block_copy_s if coordinator else 0.0,
            busy=self._busy.share(self._loop.time(), self._engine.busy_s + self.step_watch.step_s),
            slow_blocks=slow_blocks(self._engine, self._itl_target_s),
            expected_blocks=0,
            expected_requests=0,
            cached_tokens=0,
            copied_tokens=0,
            copy_s=0.0,
            **asdict(self._engine),
        )

    def stats(self) -> InstanceStats | None:
        """For metrics; None before the engine has started."""
        if (coordinator := self._coordinator) is None:
            return None
        reader = coordinator.prefixes.reader
        return InstanceStats(
            process=process_stats(),
            offers=coordinator.num_offers,
            refused_offers=coordinator.num_refused,
            bytes_received=coordinator.bytes_received,
            prefix_copies={str(outcome): number for outcome, number in reader.outcomes.items()},
            prefix_tokens=reader.tokens_copied,
            unsent_messages=len(self._wire.unsent),
            protocol_errors=coordinator.protocol_errors + len(self._wire.failures),
            message_errors=dict(self._wire.failures.by_kind),
            refused_orders=dict(self.refused_orders),
            unmovable=self.unmovable,
            orphans=dict(zip(("adopted", "ended"), self._orphans(), strict=True)),
            published_blocks=self._cached_blocks.num_keys,
            cache_reports=self._cached_blocks.number,
            full_cache_reports=self._cached_blocks.num_asked,
        )

    def report_soon(self) -> None:
        """Reports as soon as the last report is old enough."""
        if self._due is None:
            interval_s = report_interval_s(len(self._members.instances))
            delay = max(0.0, self._reported_at + interval_s - self._loop.time())
            self._due = self._loop.call_later(delay, self._report)

    def _report(self) -> None:
        self._due = None
        self._reported_at = self._loop.time()
        if self._coordinator is None:
            return
        stats = None
        if self._reported_at - self._stats_at >= STATS_INTERVAL_S:
            self._stats_at, stats = self._reported_at, self.stats()
        numbers = self._request_reports(), self._cached_blocks.number
        report = LoadReport(self.load(), self._stranded(), stats, *numbers)
        for api_server in self._members.api_servers:
            self._wire.send(api_server, report)
        self._cached_blocks.report_soon()
        self._wire.send(SCHEDULER, report)
        state = (self.role, self.draining)
        if stats is not None or self.draining or state != self._reported_state:
            self._wire.send(MANAGER, report)
            self._reported_state = state
