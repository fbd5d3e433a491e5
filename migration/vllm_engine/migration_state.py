"""What a scheduler with migration knows beside vLLM's own state."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.v1.request import Request

from migration.errors import SourceGoneError
from migration.messages import KvPart


@dataclass
class Suspended:
    """A request that is off the running list and has no step in flight."""

    request: Request
    tail: KvPart


@dataclass
class StageWaiter:
    """A pending `Engine.next_stage`."""

    request_id: str
    incarnation: int
    tokens_done: int
    suspend: bool
    reader: str
    answer: Callable[[KvPart | Suspended | SourceGoneError], None]


@dataclass
class MigrationState:
    """What the mixin adds to a scheduler's state."""

    arriving: dict[str, Request] = field(default_factory=dict)  # by migration id
    arrived: dict[str, str] = field(default_factory=dict)  # migration id by request id, once committed
    suspended: dict[str, Request] = field(default_factory=dict)  # by request id
    waiters: dict[str, StageWaiter] = field(default_factory=dict)  # by request id
    entered_at: dict[str, int] = field(default_factory=dict)  # step by request id, if steps overlap
