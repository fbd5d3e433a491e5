"""State of a request in progress in its API server."""

import asyncio
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from migration.messages import RequestId
from pd_serve.frontend.token_ledger import TokenLedger
from router.request import NewRequest


class Sighting(NamedTuple):
    """The report with the highest epoch of a request.

    Attributes:
        report: Number of the report.
        epoch, emitted, finished: See `migration.engine_interface.HeldRequest`.
    """

    instance_id: str = ""
    report: int = 0
    epoch: int = -1
    emitted: int = 0
    finished: bool = False


@dataclass(slots=True)
class Check:
    """State of the comparison of a request with reports; see `pd_serve.frontend.reconciler`.

    Attributes:
        progress: The instance that it is believed on, epoch of its last recompute, and delivered tokens. The
            comparison starts anew at every progress.
        report: Number of the last report that was compared.
        heartbeat: Number of the last heartbeat before the comparison started.
        behind, missing: Reports in a row with more tokens than were delivered, and without the request.
    """

    progress: tuple[str, int, int] = ("", 0, 0)
    report: int = 0
    heartbeat: int = 0
    behind: int = 0
    missing: int = 0


@dataclass
class TrackedRequest:
    """One request in progress.

    Attributes:
        payload: The encoded request, kept for a recompute.
        new: The request in the form that dispatch uses.
        max_tokens: Maximum number of output tokens; None if unknown.
        ledger: The request's tokens and its owner, the instance that runs it.
        destination: Decode instance in whose projected load it counts.
        committed_to: Destination of a committed migration until its first token has come; otherwise "".
        deaths, deaths_in_a_row: Deaths of instances that it may have caused, the last one at `died_at`, with
            `died_at_token` tokens, which were `progress` more than at the death before; see
            `pd_serve.frontend.suspects`.
        recomputed_at: Time at which an instance has got it after the last death.
        arrived_at: Time of the waiting line's clock.
        charged_tokens: Output tokens that its account was charged for.
        losses: Recomputes because of lost or wrong messages, while its instances lived.
        retry_at: Earliest time of its next recompute.
        sighting, check: State of its reconciliation.
        move_waiters: Futures that wait for the first token from the next owner.
    """

    request_id: RequestId
    payload: list[bytes]
    new: NewRequest
    ledger: TokenLedger
    max_tokens: int | None = None
    destination: str = ""
    committed_to: str = ""
    deaths: int = 0
    deaths_in_a_row: int = 0
    died_at: float = -math.inf
    died_at_token: int = 0
    recomputed_at: float = -math.inf
    progress: int = 0
    losses: int = 0
    retry_at: float = 0.0
    arrived_at: float = 0.0
    charged_tokens: int = 0
    placed_at: float = 0.0
    sighting: Sighting = field(default_factory=Sighting)
    check: Check = field(default_factory=Check)
    move_waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens so far."""
        return self.new.prompt_tokens + len(self.ledger.token_ids)

    @property
    def place(self) -> tuple[int, float]:
        """Its place among the requests that wait: the priority, and when it counts as arrived."""
        return self.new.priority, self.arrived_at + self.new.arrives_later_s

    @property
    def is_new(self) -> bool:
        """Whether no instance has had it yet."""
        return not self.ledger.owner and not self.ledger.epoch

    @property
    def ends_with_prefill(self) -> bool:
        """Whether its next prefill generates its last token."""
        return self.max_tokens is not None and self.max_tokens - len(self.ledger.token_ids) <= 1

    def is_on(self, instance_id: str) -> bool:
        """Whether it runs on this instance, or a migration to it has been committed."""
        return instance_id in (self.ledger.owner, self.committed_to)

    def wake_move_waiters(self) -> None:
        """Call at the first token of the next owner, and at the end of the request."""
        for waiter in self.move_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.move_waiters.clear()
