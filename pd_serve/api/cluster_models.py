"""Bodies and answers of `/cluster`, for checks and for the OpenAPI document.

What an answer holds besides is said where it is made; clients should pass over fields that they do not know.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

Name = Annotated[str, Field(min_length=1)]
Role = Literal["prefill", "decode", "neutral"]
Count = Annotated[int, Field(ge=0)]

#: More than anybody means: what is asked for is begun at once, and every number has to fit into a message.
MAX_INSTANCES = 10_000

Sizes = dict[Role, Annotated[int, Field(strict=True, ge=0, le=MAX_INSTANCES)]]


class MigrateRequest(BaseModel):
    """Body of `POST /cluster/migrate`."""

    request_id: Name
    destination: Name


class DrainRequest(BaseModel):
    """Body of `POST /cluster/drain`."""

    instance: Name
    draining: bool = True
    stop: bool = False


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Migrated(_Answer):
    """What one migration cost.

    Attributes:
        downtime_ms: Gap between the last token from the source and the first from the destination.
        stages: Copy rounds, the final one included.
        blocks: KV blocks copied in all rounds.
        tokens: Length of the sequence when it changed owner.
    """

    downtime_ms: float
    stages: Count
    blocks: Count
    tokens: Count


class Instance(_Answer):
    """One instance, as its last report says; null for a freeness without bound."""

    id: str
    role: str
    state: str
    draining: bool
    node: str
    pid: int
    total_blocks: Count
    free_blocks: Count
    running: Count
    waiting: Count
    freeness: float | None
    migrating_in: Count
    migrating_out: Count


class Cluster(_Answer):
    """The instances, who waits for one, and what became of migrations, by reason."""

    instances: list[Instance]
    waiting_line: dict[str, Any]
    migrations: dict[str, dict[str, Count]]


class Timeline(_Answer):
    """One request; times are seconds since it was issued."""

    id: str
    name: str
    state: Literal["waiting", "prefill", "decode", "ended"]
    stages: list[dict[str, Any]]
    instances: list[dict[str, Any]]
    migrations: list[dict[str, Any]]


class Timelines(_Answer):
    """All requests that go by a name."""

    id: str
    requests: list[Timeline]


class Integrity(_Answer):
    """Whether every invariant holds, and which do not, in words."""

    ok: bool
    violations: list[str]


class Unauthorized(BaseModel):
    """vLLM's answer to a missing or wrong key."""

    error: Literal["Unauthorized"]


def answers(*statuses: int, **kinds: Any) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: the errors that it may give, in OpenAI's shape, and the answer.

    Args:
        kinds: `ok`, the model of a 200; or `begun`, that of a 202.
    """
    why = {
        400: "The request cannot be read, or asks for what cannot be",
        404: "No such request or instance",
        409: "It is refused; the message says why",
        503: "The owner of the instances is not there; try again in a moment",
    }
    found: dict[int | str, dict[str, Any]] = {
        401: {"model": Unauthorized, "description": "No key, or a wrong one"}
    }
    found |= {status: {"model": ErrorResponse, "description": why[status]} for status in statuses}
    if "ok" in kinds:
        found[200] = {"model": kinds["ok"]}
    if "begun" in kinds:
        found[202] = {"model": kinds["begun"], "description": "It has begun"}
    return found
