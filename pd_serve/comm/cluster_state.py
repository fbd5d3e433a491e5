"""The state of the cluster that the manager sends to API servers, for `GET /cluster` and `/metrics`."""

from typing import Annotated

import msgspec
from msgspec import Meta

#: Text of a metric that every process has.
MESSAGE_ERRORS = (
    "Messages that the process could not handle, by kind: they could not be decoded (decode), or their "
    "handler, a remote call or a task failed (handler, call, task); should be 0."
)

#: Field of a report that counts up. Every field with a description is a metric; see
#: `pd_serve.observe.cluster_metrics`.
COUNTER = {"kind": "counter"}


class ProcessStats(msgspec.Struct, frozen=True):
    """Resources that a process has used."""

    cpu_seconds: Annotated[float, Meta(description="CPU time of the process.", extra=COUNTER)]
    resident_bytes: Annotated[
        float, Meta(title="resident_memory_bytes", description="Resident memory of the process.")
    ]
    started_at: Annotated[
        float, Meta(title="start_time_seconds", description="Unix time of the start of the process.")
    ]


class SchedulerStats(msgspec.Struct, frozen=True):
    """Metrics of the scheduler. Counts are since its start.

    Attributes:
        problems: Failures of the scheduler's message handlers, one text each.
    """

    process: ProcessStats
    instances: Annotated[int, Meta(description="Instances that report to the scheduler.")]
    moves: Annotated[
        dict[str, int],
        Meta(description="Orders to move a request, by reason.", extra=COUNTER | {"label": "reason"}),
    ]
    scaling: Annotated[
        dict[str, int],
        Meta(
            title="decisions",
            description="Decisions about instances (start, stop, drain, use_again, set_role).",
            extra=COUNTER | {"label": "decision"},
        ),
    ]
    problems: list[str] = []
    message_errors: Annotated[
        dict[str, int], Meta(description=MESSAGE_ERRORS, extra=COUNTER | {"label": "kind"})
    ] = {}


class SchedulerState(msgspec.Struct, frozen=True):
    """The scheduler as the manager sees it.

    Attributes:
        state: "alive" or "absent".
        restarts: Schedulers started in place of one that died.
    """

    state: str
    policy: str
    pid: int | None
    restarts: int


class StartingInstance(msgspec.Struct, frozen=True):
    """An instance that does not serve yet. `state` is a text."""

    id: str
    role: str
    state: str


class ScaledCount(msgspec.Struct, frozen=True):
    """Number of instances started, stopped or lost (`action`) while serving."""

    action: str
    role: str
    instances: int


class PastDecision(msgspec.Struct, frozen=True):
    """A decision about instances, with its reason."""

    seconds_ago: float
    what: str


class RestartState(msgspec.Struct, frozen=True):
    """The rolling restart: whether one is running, and the progress of the last one as a text."""

    running: bool
    progress: str


class ClusterState(msgspec.Struct, frozen=True, tag=True):
    """Manager → API servers, on every change and as a heartbeat.

    Attributes:
        starting: Instances that do not serve yet.
        decisions: The latest decisions, newest first.
        scheduler_stats: Last metrics of the scheduler; None while there is no scheduler.
        problems: Failures of the manager's message handlers, one text each.
        message_errors: Messages that the manager could not handle, by kind.
        wanted: Number of instances that there should be at least, by role.
        replaces: Whether instances are started in the place of dead ones.
    """

    starting: list[StartingInstance]
    scheduler: SchedulerState
    scaled: list[ScaledCount]
    decisions: list[PastDecision]
    restart: RestartState
    scheduler_stats: SchedulerStats | None = None
    problems: list[str] = []
    wanted: dict[str, int] = {}
    message_errors: dict[str, int] = {}
    replaces: bool = True
