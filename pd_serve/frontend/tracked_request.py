"""What an API server keeps of a request in progress."""

import asyncio
from dataclasses import dataclass, field

from migration.messages import RequestId
from pd_serve.frontend.token_ledger import TokenLedger
from router.request import NewRequest


@dataclass
class TrackedRequest:
    """One request in progress.

    Attributes:
        payload: The encoded request, kept in case its owner dies.
        request: What dispatch needs to know of it.
        max_tokens: It ends with so many at the latest; None: nobody knows.
        ledger: Its tokens and its owner.
        destination: Where it is expected next, and counts in the load book.
        committed_to: Where it lives by its last owner's word; empty once the ledger has heard from there.
        moved: Waiters for the first token from the next owner.
    """

    request_id: RequestId
    payload: list[bytes]
    request: NewRequest
    ledger: TokenLedger
    max_tokens: int | None = None
    destination: str = ""
    committed_to: str = ""
    recomputes: int = 0
    placed_at: float = 0.0
    moved: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def ends_with_prefill(self) -> bool:
        """Whether the first token from its next prefill is its last one."""
        return self.max_tokens is not None and self.max_tokens - len(self.ledger.token_ids) <= 1
