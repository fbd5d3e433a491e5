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
        payload: The encoded request, kept in case its instance dies.
        new: The request as dispatch sees it.
        max_tokens: Most tokens that it may generate; None if that is not known.
        ledger: Its tokens and its owner, the instance that runs it.
        destination: Decode instance that it is expected on; it counts in the projected load there.
        committed_to: Instance that it runs on by its last owner's word; empty once a token has come from
            there.
        moved: Futures that wait for the first token from the next owner.
    """

    request_id: RequestId
    payload: list[bytes]
    new: NewRequest
    ledger: TokenLedger
    max_tokens: int | None = None
    destination: str = ""
    committed_to: str = ""
    recomputes: int = 0
    placed_at: float = 0.0
    moved: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return self.new.prompt_tokens + len(self.ledger.token_ids)

    @property
    def ends_with_prefill(self) -> bool:
        """Whether the first token from its next prefill is its last one."""
        return self.max_tokens is not None and self.max_tokens - len(self.ledger.token_ids) <= 1

    def is_on(self, instance_id: str) -> bool:
        """Whether it runs on this instance, or has been committed to it."""
        return instance_id in (self.ledger.owner, self.committed_to)

    def wake_movers(self) -> None:
        """The next owner has been heard, or the request has ended."""
        for waiter in self.moved:
            if not waiter.done():
                waiter.set_result(None)
        self.moved.clear()
