"""What API servers and instances say to each other. One-way; msgpack on the wire, never pickle.

Migration messages between instances travel on the same sockets: see `migration.messages`.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from migration.engine_interface import HeldBlocks
from migration.errors import RefusalCode
from migration.messages import (
    Committed,
    Dropped,
    Final,
    InstanceId,
    KeepAlive,
    Offer,
    Pull,
    Query,
    Refused,
    RequestId,
    Stage,
    Withdraw,
)
from migration.record import MigrationRecord
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import NO_DEMAND, Demand


class Hello(msgspec.Struct, frozen=True, tag=True):
    """API server → instance or scheduler: I am here. Sent on joining and as a heartbeat.

    Attributes:
        address: Where the sender takes messages.
        token_endpoint: Where it takes tokens.
        peers: Every live instance's address, by id: the cluster's membership.
        starting: Instances that are coming, by role.
        waiting: Requests at the sender that no instance has yet, and the tokens of their prompts.
        owns: Whether the sender starts and stops instances.
    """

    address: str
    token_endpoint: str
    peers: dict[str, str]
    starting: dict[str, int] = {}
    waiting: Demand = NO_DEMAND
    owns: bool = True


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """A started instance."""

    instance_id: str
    role: str
    address: str
    node: str
    pid: int
    no_migration: str | None
    supported_tasks: list[str]
    max_model_len: int
    num_blocks: int
    block_tokens: int


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """API server → instance. The engine's encoding of the request follows in further frames.

    Attributes:
        handoff: Decode instances to move to after the first step, best first. Empty: there are none now, so
            it is stranded until there are. None: it stays.
        output_token_ids: What was generated before its former owner died.
    """

    request_id: RequestId
    client: str
    epoch: int
    handoff: list[str] | None
    output_token_ids: list[int]


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """API server → instance, or passed on by an instance that the request has left.

    Attributes:
        below_epoch: Ends only what is owned under a lower epoch: a copy that nobody follows any more, and
            not the one that replaced it, which this message may meet on its way. None: whatever is there.
    """

    request_ids: list[RequestId]
    below_epoch: int | None = None


class MigrateRequest(msgspec.Struct, frozen=True, tag=True):
    """API server → instance: move a request. Answered by `MigrationEnded` with the same call id."""

    call_id: str
    request_id: RequestId
    destination: str
    reason: str
    blocking: bool = False


class MoveOut(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → instance: move one request of your choice.

    Attributes:
        destination: Its load as the scheduler sees it.
        selection: The policy to choose by; see `router.rescheduling.selection`.
    """

    destination: InstanceLoad
    reason: str
    selection: PolicyChoice


class SetRole(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → instance: what it is used for from now on."""

    role: str


class SetDraining(msgspec.Struct, frozen=True, tag=True):
    """Scheduler, or somebody by way of an API server → instance: take nothing new, or take it again.

    Attributes:
        by_hand: What is drained by hand is not to be used again because the scheduler says so.
    """

    draining: bool
    by_hand: bool = False


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → instance: send load reports here. Repeated as a heartbeat."""

    address: str


class StartInstance(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → service: one more instance of this role."""

    role: str
    reason: str


class StopInstance(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → service: this instance is drained and empty."""

    instance_id: str
    reason: str


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
    """Metrics of the scheduler. Counts are since its start."""

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


class SchedulerReport(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → API server, on decisions and as a heartbeat.

    Attributes:
        decided: What it has told instances since the last report, one line each that begins with an id.
        stats: With a heartbeat.
    """

    decided: list[str]
    stats: SchedulerStats | None = None


class Call(msgspec.Struct, frozen=True, tag=True):
    """API server → instance: `check_integrity`, `live_requests`, `holdings` or a utility of vLLM's engine.
    Also between API servers and the owner of the instances, for what is asked by hand."""

    call_id: str
    method: str
    arguments: list[Any] = []


class Holdings(msgspec.Struct, frozen=True, array_like=True):
    """Answer to the call `holdings`, which is made only while somebody watches the live page.

    Attributes:
        held: KV blocks by request.
        leaving: Migrations under way from here: request, destination, reason.
    """

    held: list[HeldBlocks]
    leaving: list[tuple[RequestId, InstanceId, str]]


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """API server → instance: this instance is dead."""

    instance_id: str


class InstanceStats(msgspec.Struct, frozen=True):
    """Metrics of an instance that no decision needs. Counts are since its start."""

    process: ProcessStats
    offers: Annotated[int, Meta(description="Requests that peers offered to the instance.", extra=COUNTER)]
    refused_offers: Annotated[int, Meta(description="Offers that the instance refused.", extra=COUNTER)]
    bytes_received: Annotated[
        int,
        Meta(
            title="received_bytes",
            description="KV bytes copied to the instance, aborted migrations included.",
            extra=COUNTER,
        ),
    ]
    protocol_errors: Annotated[
        int, Meta(description="Invalid migration messages; should be 0.", extra=COUNTER)
    ]


class LoadReport(msgspec.Struct, frozen=True, tag=True):
    """Instance → API servers and scheduler.

    Attributes:
        stranded: Requests that wait here for a decode instance to take them.
        stats: About once a second.
    """

    load: InstanceLoad
    stranded: list[RequestId]
    stats: InstanceStats | None = None


class MigrationEnded(msgspec.Struct, frozen=True, tag=True):
    """Instance → API servers: one outgoing migration has ended, or could not begin.

    Attributes:
        call_id: Of the `MigrateRequest` that this answers; empty if sent to all API servers.
    """

    call_id: str
    record: MigrationRecord


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Answer to a `Call`.

    Attributes:
        kind: The name of the error's class, where it matters.
        code: Of a `MigrationRefusedError` that has one.
    """

    call_id: str
    value: Any = None
    error: str | None = None
    kind: str = ""
    code: RefusalCode | None = None


class Join(msgspec.Struct, frozen=True, tag=True):
    """API server → owner of the instances: I am here. Sent as a heartbeat.

    Attributes:
        address: Where the sender takes messages of the owner.
        clear: Instances of `Members.leaving` that the sender has no request at any more, nor will have.
    """

    address: str
    clear: list[str]


class Members(msgspec.Struct, frozen=True, tag=True):
    """Owner of the instances → API servers: everything there is. Sent on a change and as a heartbeat.

    Attributes:
        address: Where the sender takes messages.
        scheduler: The scheduler's address; "" if there is none.
        leaving: Instances that are stopped as soon as they are empty.
        state: What `GET /cluster` shows beside the instances; see `Fleet.state`.
    """

    address: str
    instances: list[InstanceInfo]
    scheduler: str
    leaving: list[str]
    state: dict[str, Any]


MigrationWire = Offer | Refused | Pull | Stage | Final | KeepAlive | Withdraw | Query | Committed | Dropped
ToInstance = (
    Hello
    | AddRequest
    | AbortRequests
    | MigrateRequest
    | MoveOut
    | SetRole
    | SetDraining
    | Subscribe
    | Call
    | PeerLost
    | MigrationWire
)
ToApiServer = LoadReport | MigrationEnded | Reply | StartInstance | StopInstance | SchedulerReport
ToOwner = Join | Call | Reply
ToApiServerFromOwner = Members | Call | Reply
ToScheduler = Hello | PeerLost | LoadReport


class TokenHeader(msgspec.Struct, frozen=True, array_like=True):
    """First frame of a step's tokens; vLLM's encoding of its `EngineCoreOutputs` follows.

    Attributes:
        spans: (ownership epoch, index of the first new token) per output, in order.
    """

    instance_id: str
    spans: list[tuple[int, int]]
