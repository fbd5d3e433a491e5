"""What the manager tells API servers beside the membership, for `GET /cluster` and `/metrics`."""

from typing import Annotated

import msgspec
from msgspec import Meta

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
        problems: Failures of its message handlers, in words.
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


class SchedulerState(msgspec.Struct, frozen=True):
    """Attributes:
    state: "alive" or "absent".
    restarts: Schedulers started in the place of a dead one.
    """

    state: str
    policy: str
    pid: int | None
    restarts: int


class StartingInstance(msgspec.Struct, frozen=True):
    """An instance that does not serve yet; its id is "" until its start begins. `state` in words."""

    id: str
    role: str
    state: str


class ScaledCount(msgspec.Struct, frozen=True):
    """Instances started or stopped (`action`) while serving."""

    action: str
    role: str
    instances: int


class PastDecision(msgspec.Struct, frozen=True):
    seconds_ago: float
    what: str


class RestartState(msgspec.Struct, frozen=True):
    """The rolling restart: whether one is under way, and how far the last one came, in words."""

    running: bool
    progress: str


class ClusterState(msgspec.Struct, frozen=True, tag=True):
    """Manager → API servers, on every change and as a heartbeat.

    Attributes:
        starting: Instances that do not serve yet.
        decisions: The latest ones, newest first.
        scheduler_stats: The last ones; None while there is no scheduler.
        problems: Failures of the manager's message handlers, in words.
    """

    starting: list[StartingInstance]
    scheduler: SchedulerState
    scaled: list[ScaledCount]
    decisions: list[PastDecision]
    restart: RestartState
    api_servers: list[str]
    scheduler_stats: SchedulerStats | None = None
    problems: list[str] = []
