"""What the API keys of a service use: limits per minute, and shares of the queue.

An account is the number of a key; without keys all clients have one.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from pd_serve.errors import RequestRefusedError
from pd_serve.frontend.tracked_request import TrackedRequest
from router.fair_share import FairShare
from router.rate_limits import KeyLimits, RateLimits

#: `code` of a refusal.
LIMITED = "rate_limit_exceeded"


class Accounts:
    """The accounts of one API server.

    Args:
        limits: By account; nothing is limited beyond them.
        shares: None if arrival alone orders the queue.
        clock: In seconds.
        in_turn: Returns an encoded request that arrives at its engine now: engines keep their queues in the
            order of arrival, and the line has another one.

    Attributes:
        is_used: Whether there are limits or shares.
        limits: Of this API server: its part of those of the service.
    """

    def __init__(
        self,
        limits: Sequence[KeyLimits] = (),
        shares: FairShare | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        in_turn: Callable[[list[bytes]], list[bytes]] = lambda payload: payload,
    ) -> None:
        self.limits = RateLimits(limits)
        self.shares = shares
        self.in_turn = in_turn
        self.is_used = shares is not None or any(one.has_limits for one in limits)
        self._clock = clock

    def take(self, account: int, requests: int, tokens: int, taken: tuple[int, int] = (0, 0)) -> None:
        """Takes requests and the tokens of their prompts from what an account has left.

        Args:
            taken: See `RateLimits.take`.

        Raises:
            RequestRefusedError: It has not enough left; nothing is taken.
        """
        lacking = self.limits.take(account, requests, tokens, self._clock(), taken)
        if lacking is not None:
            servers = self.limits.num_servers
            part = f" at this one of {servers} API servers, which has its part of it" if servers > 1 else ""
            raise RequestRefusedError(
                f"The limit of {lacking.per_minute:g} {lacking.name} per minute is reached{part}; try again"
                f" in {lacking.wait_s:.1f} s.",
                LIMITED,
                max(math.ceil(lacking.wait_s), 1),
            )

    def give_back(self, account: int, requests: int, tokens: int) -> None:
        """Gives back what `take` took for requests that were not started."""
        self.limits.give_back(account, requests, tokens)

    def headers(self, account: int) -> dict[str, str]:
        """What an account has left, in the headers that OpenAI's API has."""
        found = {}
        for one in self.limits.budgets(account, self._clock()):
            found[f"x-ratelimit-limit-{one.name}"] = f"{int(one.limit)}"
            found[f"x-ratelimit-remaining-{one.name}"] = f"{max(int(one.remaining), 0)}"
            found[f"x-ratelimit-reset-{one.name}"] = f"{one.reset_s:.3f}s"
        return found

    def charge(self, requests: Iterable[TrackedRequest]) -> None:
        """Charges the output tokens that have been delivered since the last call."""
        if not self.is_used:
            return
        for request in requests:
            if new := len(request.ledger.token_ids) - request.charged_tokens:
                request.charged_tokens += new
                self.limits.generated(request.new.account, new)
                if self.shares is not None:
                    self.shares.generated(request.new.account, new)
