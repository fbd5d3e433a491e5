"""One-way messages between processes, by channel; msgpack on the wire, never pickle.

Migration messages between instances (`migration.messages`) use the same sockets. Membership and remote calls
have modules of their own: `pd_serve.comm.membership`, `pd_serve.comm.requests`.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from migration.engine_interface import HeldRequest
from migration.messages import (
    Committed,
    Confirmed,
    Dropped,
    Final,
    KeepAlive,
    Offer,
    Pull,
    Query,
    Refused,
    RequestId,
    Stage,
    Withdraw,
)
from migration.prefix_messages import AnyPrefixMessage
from migration.record import MigrationRecord
from migration.token_span import TokenSpan
from pd_serve.comm.cached_blocks import CachedBlocks, FollowCachedBlocks
from pd_serve.comm.cluster_state import COUNTER, MESSAGE_ERRORS, ClusterState, ProcessStats, SchedulerStats
from pd_serve.comm.membership import ApiServerStatus, Join, Membership
from pd_serve.comm.requests import Call
from pd_serve.comm.rpc import Answer
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import NO_DEMAND, Demand

# ---- API server → instance, scheduler


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """API server → instance or scheduler.

    Attributes:
        waiting: Requests in the sender's waiting line, and the tokens of their prompts.
        number: Of this heartbeat, from 1 on. `RequestReport` has the last one: an instance that has received
            it has received everything that this API server sent before.
    """

    waiting: Demand = NO_DEMAND
    number: int = 0


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """API server → instance. The engine's encoding of the request follows in further frames.

    Attributes:
        client: Token endpoint of the API server.
        handoff: Decode instances for the hand-off after the first step, best first. Empty: there is none now,
            and the request is stranded until there is one. None: no hand-off.
        output_token_ids: Tokens generated before the request was lost with its last instance.
        prefix_from: Instance to copy the KV blocks of the prompt's prefix from, before it is queued.
    """

    request_id: RequestId
    client: str
    epoch: int
    handoff: list[str] | None
    output_token_ids: list[int]
    prefix_from: str | None = None


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """API server → instance; an instance that a request has left forwards it to the request's destination.

    Attributes:
        below_epoch: Ends only copies of a lower epoch: an old copy, not the copy that replaced it, which may
            be on the same instance. None: ends any copy.
    """

    request_ids: list[RequestId]
    below_epoch: int | None = None


class ResendTokens(msgspec.Struct, frozen=True, tag=True):
    """API server → instance: send output tokens of these requests again, each from an index on."""

    requests: list[tuple[RequestId, int]]


class HandOff(msgspec.Struct, frozen=True, tag=True):
    """API server → prefill instance: hand off a stranded request to this decode instance."""

    request_id: RequestId
    destination: str


# ---- scheduler → instance


class MoveOut(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → instance: move one running request of your choice.

    Attributes:
        destination: Load of the destination as the scheduler sees it.
        selection: The policy that chooses the request; see `router.rescheduling.selection`.
    """

    destination: InstanceLoad
    reason: str
    selection: PolicyChoice


class SetRole(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → instance: the role from now on."""

    role: str


class SetDraining(msgspec.Struct, frozen=True, tag=True):
    """Scheduler or manager → instance: take no new requests, or take them again.

    Attributes:
        by_operator: The manager sends it for an operator. The scheduler cannot end a drain by an operator.
    """

    draining: bool
    by_operator: bool = False


# ---- scheduler → manager


class StartInstance(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → manager: one more instance of this role."""

    role: str
    reason: str


class StopInstance(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → manager: this instance is drained and empty."""

    instance_id: str
    reason: str


class Decision(msgspec.Struct, frozen=True):
    """A decision of the scheduler about one instance; `action` is a text: "is drained", "becomes decode"."""

    instance_id: str
    action: str
    reason: str


class SchedulerReport(msgspec.Struct, frozen=True, tag=True):
    """Scheduler → manager, on decisions and as a heartbeat; `stats` with a heartbeat."""

    decisions: list[Decision]
    stats: SchedulerStats | None = None


# ---- instance → API servers, scheduler, manager


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
    unsent_messages: Annotated[
        int,
        Meta(
            description="Messages dropped because their receiver was not connected or did not read.",
            extra=COUNTER,
        ),
    ]
    protocol_errors: Annotated[
        int, Meta(description="Invalid messages, and failed message handlers; should be 0.", extra=COUNTER)
    ]
    message_errors: Annotated[
        dict[str, int], Meta(description=MESSAGE_ERRORS, extra=COUNTER | {"label": "kind"})
    ] = {}
    refused_orders: Annotated[
        dict[str, int],
        Meta(
            description="Orders of the scheduler that the instance did not carry out, by reason (policy: not "
            "installed here, or it failed; destination: no member; role: unknown; too_many at a time); "
            "should be 0.",
            extra=COUNTER | {"label": "reason"},
        ),
    ] = {}
    prefix_copies: Annotated[
        dict[str, int],
        Meta(
            description="Copies of prefixes of prompts to the instance, by outcome: copied, or why not.",
            extra=COUNTER | {"label": "outcome"},
        ),
    ] = {}
    prefix_tokens: Annotated[
        int,
        Meta(
            title="copied_prefix_tokens",
            description="Tokens whose KV was copied to the instance in the place of computing it.",
            extra=COUNTER,
        ),
    ] = 0
    unmovable: Annotated[
        dict[str, int],
        Meta(
            title="unmovable_requests",
            description="Requests that stay on the instance until they end, by reason (pooling; no_data: "
            "multimodal input whose data was not sent with it; too_large: inputs of more than 64 MiB; "
            "session: streaming input; kv_transfer: of the request's own). If the whole engine cannot move "
            "requests, `migration_enabled` is 0.",
            extra={"label": "reason"},
        ),
    ] = {}
    orphans: Annotated[
        dict[str, int],
        Meta(
            description="Requests that outlived their API server, by outcome: adopted (their client asked "
            "another API server) or ended (no client came back in time).",
            extra=COUNTER | {"label": "outcome"},
        ),
    ] = {}
    published_blocks: Annotated[
        int,
        Meta(description="Blocks in the prefix cache that API servers know of; 0 if no policy needs them."),
    ] = 0
    cache_reports: Annotated[
        int, Meta(description="Reports of blocks that the prefix cache gained and lost.", extra=COUNTER)
    ] = 0
    full_cache_reports: Annotated[
        int,
        Meta(
            description="How often an API server was told all blocks in the prefix cache: at its start, and "
            "after a report that did not arrive.",
            extra=COUNTER,
        ),
    ] = 0


class LoadReport(msgspec.Struct, frozen=True, tag=True):
    """Instance → API servers and scheduler; to the manager as a heartbeat, and while it drains.

    Attributes:
        stranded: Requests that wait on this instance until a decode instance takes them.
        stats: Metrics of the instance, about once a second.
        request_reports: Number of the last `RequestReport` that was sent.
        cache_reports: Number of the last `CachedBlocks` that was sent.
    """

    load: InstanceLoad
    stranded: list[RequestId]
    stats: InstanceStats | None = None
    request_reports: int = 0
    cache_reports: int = 0


class MigrationEnded(msgspec.Struct, frozen=True, tag=True):
    """Instance → API servers: one outgoing migration has ended."""

    record: MigrationRecord


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    """Instance → API server: the engine could not take this request.

    Attributes:
        is_invalid: Because of its parameters: no engine can.
    """

    request_id: RequestId
    error: str
    is_invalid: bool = False


class RequestReport(msgspec.Struct, frozen=True, array_like=True):
    """Instance → API server: the requests of this API server that the instance has.

    It goes to the token endpoint, in order with the tokens: the API server has received all tokens of which
    `HeldRequest.emitted` tells, or they are lost.

    Attributes:
        number: Of this report, from 1 on, the same for all API servers.
        heartbeat: Number of the last heartbeat of the API server that the instance had received.
    """

    number: int
    heartbeat: int
    requests: list[HeldRequest]


class TokenHeader(msgspec.Struct, frozen=True, array_like=True):
    """First frame of a step's tokens, which vLLM's encoding of its `EngineCoreOutputs` follows; or a report.

    Attributes:
        spans: One per output, in order.
        report: The instance's requests. Nothing follows it.
    """

    instance_id: str
    spans: list[TokenSpan]
    report: RequestReport | None = None


# ---- messages that each kind of process receives

MigrationWire = (
    Offer | Refused | Pull | Stage | Final | KeepAlive | Withdraw | Confirmed | Query | Committed | Dropped
)
ToInstance = (
    Membership
    | Heartbeat
    | AddRequest
    | AbortRequests
    | ResendTokens
    | FollowCachedBlocks
    | HandOff
    | MoveOut
    | SetRole
    | SetDraining
    | Call
    | MigrationWire
    | AnyPrefixMessage
)
ToApiServer = (
    Membership
    | ClusterState
    | ApiServerStatus
    | LoadReport
    | CachedBlocks
    | MigrationEnded
    | RequestFailed
    | Call
    | Answer
)
ToManager = Join | LoadReport | StartInstance | StopInstance | SchedulerReport | Call | Answer
ToScheduler = Membership | Heartbeat | LoadReport
