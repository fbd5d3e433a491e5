"""The cluster as `GET /cluster` shows it."""

import math

import msgspec
from msgspec.structs import replace

from pd_serve.comm.cluster_state import (
    ClusterState,
    PastDecision,
    RestartState,
    ScaledCount,
    SchedulerState,
    StartingInstance,
)
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.messages import InstanceStats
from pd_serve.observe.attainment import WINDOW_S
from router.freeness import freeness, headroom
from router.load import InstanceLoad


class InstanceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One instance by its latest load report.

    Attributes:
        state: "ready", "draining", "starting", or what its start waits for; "unreachable" if messages between
            it and the API server that answers do not arrive.
        freeness: Free blocks per running request; null while it drains.
        preempted: Queued requests that have lost their KV blocks.
        queued_blocks: KV blocks that the first queued request needs; not free for freeness.
        headroom_blocks: KV blocks kept for requests of high priority in the batch; not free for freeness.
        expected_blocks: KV blocks for requests that are on their way here; not free for freeness.
        batch: Requests that freeness divides by: those that run or are on their way, at least 1.
        no_migration: Why requests cannot move from or to the instance; null if they can.
        unmovable: Number of requests that stay on the instance until they end, by reason.
    """

    id: str
    role: str
    state: str
    draining: bool = False
    node: str = ""
    pid: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    freeness: float | None = 0.0
    migrating_in: int = 0
    migrating_out: int = 0
    preempted: int = 0
    queued_blocks: int = 0
    headroom_blocks: int = 0
    expected_blocks: int = 0
    batch: int = 1
    no_migration: str | None = None
    unmovable: dict[str, int] = {}

    @classmethod
    def of(
        cls,
        info: InstanceInfo,
        load: InstanceLoad | None,
        stats: InstanceStats | None = None,
        *,
        unreachable: bool = False,
    ) -> "InstanceSnapshot":
        """A started instance; `load` is None before its first report, and while it is unreachable."""
        if load is None:
            return cls(
                id=info.instance_id,
                role=info.role,
                state="unreachable" if unreachable else "starting",
                node=info.node,
                pid=info.pid,
                no_migration=info.engine.no_migration,
            )
        free = freeness(load)
        return cls(
            id=info.instance_id,
            role=load.role,
            state="draining" if load.draining else "ready",
            draining=load.draining,
            node=info.node,
            pid=info.pid,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            running=load.running,
            waiting=load.waiting,
            freeness=free if math.isfinite(free) else None,
            migrating_in=load.migrating_in,
            migrating_out=load.migrating_out,
            preempted=load.preempted,
            queued_blocks=load.head_of_line_blocks,
            headroom_blocks=headroom(load),
            expected_blocks=load.expected_blocks,
            batch=max(load.running + load.expected_requests, 1),
            no_migration=info.engine.no_migration,
            unmovable={reason: n for reason, n in stats.unmovable.items() if n} if stats is not None else {},
        )

    @classmethod
    def of_starting(cls, starting: StartingInstance) -> "InstanceSnapshot":
        return cls(id=starting.id, role=starting.role, state=starting.state)


class WaitingRequests(msgspec.Struct, frozen=True):
    """Requests that wait in API servers for an instance, and the tokens of their prompts."""

    requests: int
    tokens: int


class TargetsSnapshot(msgspec.Struct, frozen=True):
    """Requests with targets that have ended in the last minute, at all API servers.

    Attributes:
        met: Those of them that have met all of theirs.
        attainment: Their share; null without such requests.
        goodput: Those that have met theirs, per second.
    """

    requests: int = 0
    met: int = 0
    attainment: float | None = None
    goodput: float = 0.0

    @classmethod
    def of(cls, requests: int, met: int) -> "TargetsSnapshot":
        share = round(met / requests, 4) if requests else None
        return cls(requests, met, share, round(met / WINDOW_S, 3))


class ApiServerSnapshot(msgspec.Struct, frozen=True):
    """One API server; `requests` are those in progress."""

    id: str
    pid: int
    requests: int


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster as seen by one API server.

    Attributes:
        migrations: Numbers of committed and aborted migrations, by reason.
        manager: "alive" or "absent".
        api_servers: All that are members.
        scheduler, scaled, decisions, restart, wanted: See `ClusterState`; empty before the manager's first
            report.
    """

    instances: list[InstanceSnapshot]
    waiting_line: WaitingRequests
    migrations: dict[str, dict[str, int]]
    manager: str = "absent"
    scheduler: SchedulerState | None = None
    scaled: list[ScaledCount] = []
    decisions: list[PastDecision] = []
    restart: RestartState | None = None
    api_servers: list[ApiServerSnapshot] = []
    wanted: dict[str, int] = {}
    targets: TargetsSnapshot = TargetsSnapshot()

    def with_state(self, state: ClusterState, *, is_alive: bool) -> "ClusterSnapshot":
        """The same with what the manager has reported, which is alive or absent."""
        known = {instance.id for instance in self.instances}
        starting = [InstanceSnapshot.of_starting(new) for new in state.starting if new.id not in known]
        return replace(
            self,
            instances=[*self.instances, *starting],
            manager="alive" if is_alive else "absent",
            scheduler=state.scheduler,
            scaled=state.scaled,
            decisions=state.decisions,
            restart=state.restart,
            wanted=state.wanted,
        )
