"""All remote calls: the request, the process that serves it, and the type of the answer."""

from typing import Any, Literal

import msgspec

from migration.engine_interface import HeldBlocks
from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.membership import LoraAdapter
from pd_serve.comm.rpc import Request

# ---- API server → instance


class CheckIntegrity(Request[list[str]], frozen=True, tag=True):
    """Checks the invariants of one instance. Answer: the violations.

    Attributes:
        at_rest: No request should be on its way, so that what is left of one is a violation, too.
    """

    at_rest: bool = True


class ListRequests(Request[list[RequestId]], frozen=True, tag=True):
    """Lists the requests of one API server, given by its token endpoint, that the instance holds."""

    token_endpoint: str


class Holdings(msgspec.Struct, frozen=True, array_like=True):
    """Which requests hold KV blocks on an instance.

    Attributes:
        held: KV blocks by request.
        leaving: Outgoing migrations in progress: request, destination, reason.
    """

    held: list[HeldBlocks]
    leaving: list[tuple[RequestId, InstanceId, str]]


class ListHoldings(Request[Holdings], frozen=True, tag=True):
    """Lists held KV blocks. Sent only while a dashboard is open."""


class CallEngine(Request[Any], frozen=True, tag=True):
    """Calls a control method of the engine, by its name in vLLM's engine-core client."""

    method: str
    arguments: list[Any]


class MoveRequest(Request[MigrationRecord], frozen=True, tag=True):
    """Moves a request. The answer comes when the migration has ended, successfully or not.

    Attributes:
        blocking: Stop-and-copy instead of live migration, for comparison.
    """

    request_id: RequestId
    destination: InstanceId
    blocking: bool = False


class OrphanAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What an instance knows of a request.

    Attributes:
        state: "unknown": it has never had it; "known": it has had it; "doubtful": it has it, and its API
            server may be alive; "orphan": it has it, and its API server is gone.
        heartbeat: Of a doubtful one: number of the last heartbeat from its API server; 0 if unknown.
    """

    state: Literal["unknown", "known", "doubtful", "orphan"]
    heartbeat: int = 0


class FindOrphan(Request[OrphanAnswer], frozen=True, tag=True):
    """Asks for a request of another API server whose id has this stem (`migration.messages.stem_of`)."""

    stem: str


class Adopt(Request[bool], frozen=True, tag=True):
    """Continues an orphan of the same stem as this request of the sender; see `Engine.adopt`.

    Answer: whether there was one. All its tokens are sent, from the first one on.
    """

    request_id: RequestId
    client: str
    payload: list[bytes]


# ---- API server → manager


class DrainInstance(Request[None], frozen=True, tag=True):
    """Drains an instance, and stops it when it is empty if `stop`; or ends its drain."""

    instance_id: str
    draining: bool
    stop: bool


class ScalePools(Request[None], frozen=True, tag=True):
    """Changes the sizes of pools, by role."""

    sizes: dict[str, int]


class RestartInstances(Request[None], frozen=True, tag=True):
    """Replaces every instance by a new one, one after another; or ends that, if `cancel`."""

    cancel: bool = False


class LoadAdapter(Request[None], frozen=True, tag=True):
    """Loads a LoRA adapter on all instances, and offers it at all API servers.

    Attributes:
        reload: Also if one of this name is loaded, which it replaces.
        by_flag: An API server that starts was given it. Nothing changes if one of this name is loaded, or was
            loaded by a flag before: operators may have replaced or unloaded it meanwhile.
    """

    adapter: LoraAdapter
    reload: bool = False
    by_flag: bool = False


class UnloadAdapter(Request[None], frozen=True, tag=True):
    """Ends the offer of a LoRA adapter at all API servers."""

    name: str


# ---- API server → manager → the other API servers


class ManualMigration(msgspec.Struct, frozen=True):
    """A migration that an operator has requested.

    Attributes:
        downtime_s: Gap between the last token from the source and the first from the destination; 0 if the
            request ended before that.
    """

    record: MigrationRecord
    downtime_s: float

    @property
    def downtime_ms(self) -> float:
        return self.downtime_s * 1e3


class MigrateByName(Request[ManualMigration], frozen=True, tag=True):
    """Moves a request of another API server; `request_id` is one of the ids that its client may use."""

    request_id: str
    destination: str


class FindRequests(Request[list[dict[str, Any]]], frozen=True, tag=True):
    """Timelines of requests by name; see `pd_serve.observe.recorder.RequestRecorder.find`."""

    name: str


# ---- API server → API server


class ReadMetrics(Request[str], frozen=True, tag=True):
    """What an API server counts itself, as Prometheus' text; see `pd_serve.observe.exposition`."""


class CountedSlot(msgspec.Struct, frozen=True, array_like=True):
    """What an API server has counted in one slot of time; see `pd_serve.dashboard.recent.Slot`."""

    number: int
    first_tokens: dict[int, int]
    gaps: dict[int, int]
    tokens: int
    ended: int
    errors: int


class ReadRecent(Request[list[CountedSlot]], frozen=True, tag=True):
    """What an API server has counted lately for its live pages, from the slot `since` on."""

    since: int


class AbortByName(Request[int], frozen=True, tag=True):
    """Ends running requests by any of their names, all of them if none is given. Returns their number."""

    names: list[str]


AnyRequest = (
    CheckIntegrity
    | ListRequests
    | ListHoldings
    | CallEngine
    | MoveRequest
    | FindOrphan
    | Adopt
    | DrainInstance
    | ScalePools
    | RestartInstances
    | LoadAdapter
    | UnloadAdapter
    | MigrateByName
    | FindRequests
    | ReadMetrics
    | ReadRecent
    | AbortByName
)


class Call(msgspec.Struct, frozen=True, tag=True):
    """Message of a remote call; its `pd_serve.comm.rpc.Answer` has the same call id."""

    call_id: str
    request: AnyRequest
