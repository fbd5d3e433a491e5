"""Request bodies and responses of `/cluster`, for validation and for the OpenAPI document.

Responses may have further fields; clients should ignore fields that they do not know.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from pd_serve.setting_types import MAX_INSTANCES

Name = Annotated[str, Field(min_length=1)]
Role = Literal["prefill", "decode", "neutral"]
Count = Annotated[int, Field(ge=0)]

Sizes = dict[Role, Annotated[int, Field(strict=True, ge=0, le=MAX_INSTANCES)]]


class MigrateBody(BaseModel):
    """Body of `POST /cluster/migrate`."""

    request_id: Name
    destination: Name


class DrainBody(BaseModel):
    """Body of `POST /cluster/drain`."""

    instance: Name
    draining: bool = True
    stop: bool = False


class RestartBody(BaseModel):
    """Body of `POST /cluster/restart`."""

    cancel: bool = False


class _Response(BaseModel):
    model_config = ConfigDict(extra="allow")


class MigrateResponse(_Response):
    """The cost of a migration.

    Attributes:
        downtime_ms: Gap between the last token from the source and the first from the destination.
        stages: Copy rounds, the final one included.
        blocks: KV blocks copied in all rounds.
        tokens: Length of the sequence when it moved.
    """

    downtime_ms: float
    stages: Count
    blocks: Count
    tokens: Count


class TimelineResponse(_Response):
    """The timeline of one request; times are in seconds since it was issued.

    Attributes:
        instance: The instance that it is on now; null while it waits for one, and after its end.
    """

    id: str
    name: str
    state: Literal["waiting", "prefill", "decode", "ended"]
    instance: str | None
    stages: list[dict[str, Any]]
    instances: list[dict[str, Any]]
    migrations: list[dict[str, Any]]


class TimelinesResponse(_Response):
    """The timelines of all requests with the name `id`."""

    id: str
    requests: list[TimelineResponse]


class IntegrityResponse(_Response):
    """The result of checking the invariants: `violations` describes those that do not hold."""

    ok: bool
    violations: list[str]


class UnauthorizedResponse(BaseModel):
    """vLLM's response to a missing or wrong key."""

    error: Literal["Unauthorized"]


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of a struct without references, as part of an OpenAPI document."""
    (found,), components = msgspec.json.schema_components([kind], ref_template="{name}")

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inlined(components[node["$ref"]])
            return {key: inlined(value) for key, value in node.items()}
        return [inlined(item) for item in node] if isinstance(node, list | tuple) else node

    return dict(inlined(found))


def responses(*errors: int, ok: Any = None, accepted: Any = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route, for the OpenAPI document.

    Args:
        errors: Statuses of its errors, which have OpenAI's format.
        ok: Type of a 200: a pydantic model or a msgspec struct.
        accepted: Model of a 202.
    """
    descriptions = {
        400: "The request is invalid",
        404: "No such request or instance",
        409: "The operation is refused; the message has the reason",
        503: "The manager of the instances is absent; try again in a moment",
    }
    found: dict[int | str, dict[str, Any]] = {
        401: {"model": UnauthorizedResponse, "description": "Missing or wrong key"}
    }
    found |= {status: {"model": ErrorResponse, "description": descriptions[status]} for status in errors}
    if isinstance(ok, type) and issubclass(ok, msgspec.Struct):
        found[200] = {"content": {"application/json": {"schema": _schema(ok)}}}
    elif ok is not None:
        found[200] = {"model": ok}
    if accepted is not None:
        found[202] = {"model": accepted, "description": "The operation has begun"}
    return found
