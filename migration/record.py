"""How one migration ended: written by its source, kept by API servers."""

import msgspec

from migration.errors import Refusal
from migration.messages import CopyStage, InstanceId, RequestId


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A finished migration, as its source saw it.

    Attributes:
        reason: Why it was begun: handoff, balance, defragment, drain, manual...
        refusal: Why the request did not move; None if the request lives at the destination now.
        stages: Copies made, the tail included.
        blocks: Blocks copied; those that the destination's prefix cache had already are not.
        tokens: Tokens whose KV is at the destination now.
        suspended_ms: From the final state leaving the source to the acknowledgement: the part of the
            downtime that the source can see.
        duration_s: From the offer to the end.
        bytes_copied: As the destination counts them; 0 if not committed.
        copies: Completed stages in order.
    """

    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    reason: str
    refusal: Refusal | None = None
    stages: int = 0
    blocks: int = 0
    tokens: int = 0
    suspended_ms: float = 0.0
    duration_s: float = 0.0
    bytes_copied: int = 0
    copies: tuple[CopyStage, ...] = ()

    @property
    def committed(self) -> bool:
        """Whether the request moved."""
        return self.refusal is None

    @property
    def outcome(self) -> str:
        """`committed` or `aborted`."""
        return "committed" if self.committed else "aborted"

    @property
    def why(self) -> str:
        """Why the request did not move, in words; empty if it moved."""
        return "" if self.refusal is None else self.refusal.text
