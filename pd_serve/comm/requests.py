"""All remote calls: what is asked, of which process, and what the answer holds."""

from typing import Any

import msgspec

from migration.engine_interface import HeldBlocks
from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.rpc import Request

# ---- API server → instance


class CheckIntegrity(Request[list[str]], frozen=True, tag=True):
    """Checks the invariants of one instance. Answer: the violations."""


class LiveRequests(Request[list[RequestId]], frozen=True, tag=True):
    """Lists the requests of one API server, by its token endpoint, that hold something on the instance."""

    token_endpoint: str


class Holdings(msgspec.Struct, frozen=True, array_like=True):
    """Which requests hold KV blocks on an instance.

    Attributes:
        held: KV blocks by request.
        leaving: Migrations under way from here: request, destination, reason.
    """

    held: list[HeldBlocks]
    leaving: list[tuple[RequestId, InstanceId, str]]


class ListHoldings(Request[Holdings], frozen=True, tag=True):
    """Lists held KV blocks. Sent only while a dashboard is open."""


class CallEngine(Request[Any], frozen=True, tag=True):
    """Calls one of the engine's own control methods, by the name that vLLM's front end uses."""

    method: str
    arguments: list[Any]


class MoveRequest(Request[MigrationRecord], frozen=True, tag=True):
    """Moves a request and answers when that has ended, successfully or not.

    Args:
        blocking: Stop-and-copy instead of live migration, for comparison.
    """

    request_id: RequestId
    destination: InstanceId
    blocking: bool = False


# ---- API server → manager


class DrainInstance(Request[None], frozen=True, tag=True):
    instance_id: str
    draining: bool
    stop: bool


class ScalePools(Request[None], frozen=True, tag=True):
    """Args: `sizes` by role."""

    sizes: dict[str, int]


class RestartInstances(Request[None], frozen=True, tag=True):
    """Replaces every instance by a new one, one after another."""


# ---- API server → manager → the other API servers


class ManualMigration(msgspec.Struct, frozen=True):
    """A request that an operator has moved.

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
    """Moves a request of another API server, by any name that its client knows."""

    request_id: str
    destination: str


class FindRequests(Request[list[dict[str, Any]]], frozen=True, tag=True):
    """Timelines of requests by name; see `pd_serve.observe.recorder.RequestRecorder.find`."""

    name: str


AnyRequest = (
    CheckIntegrity
    | LiveRequests
    | ListHoldings
    | CallEngine
    | MoveRequest
    | DrainInstance
    | ScalePools
    | RestartInstances
    | MigrateByName
    | FindRequests
)


class Call(msgspec.Struct, frozen=True, tag=True):
    """A request on its way; answered by `pd_serve.comm.rpc.Answer` with the same call id."""

    call_id: str
    request: AnyRequest
