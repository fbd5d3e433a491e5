"""Limits on the requests and tokens of an API key: token buckets of a minute."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class KeyLimits(NamedTuple):
    """Requests and tokens (of prompts and outputs) per minute; infinite for no limit."""

    rpm: float = math.inf
    tpm: float = math.inf

    @property
    def has_limits(self) -> bool:
        return min(self) < math.inf


class Budget(NamedTuple):
    """What a limit leaves at the moment.

    Attributes:
        name: "requests" or "tokens".
        per_minute: The limit of all API servers together.
        limit, remaining: The part of this API server; below 0 if the outputs have taken more than was left.
        reset_s: Seconds until all of it is left.
        wait_s: Seconds until it is enough for a request that was refused.
    """

    name: str
    per_minute: float
    limit: float
    remaining: float
    reset_s: float
    wait_s: float = 0.0


class Bucket:
    """A bucket that a minute fills. Takes what is taken, and may be overdrawn."""

    def __init__(self, per_minute: float) -> None:
        self._per_minute = per_minute
        self._used = 0.0
        self._at = 0.0

    def take(self, amount: float) -> None:
        """Takes an amount, or gives back a negative one."""
        self._used = max(self._used + amount, 0.0)

    def budget(self, name: str, now: float, needed: float, servers: int, taken: float = 0.0) -> Budget:
        """What is left, at one of this many API servers, each of which has its part of the limit.

        A request that needs more than the whole bucket waits until it is full; what was `taken` is of this
        request.
        """
        limit = max(self._per_minute / servers, 1.0)
        rate = self._per_minute / servers / 60.0
        self._used = max(self._used - rate * max(now - self._at, 0.0), 0.0)
        self._at = now
        lacking = max(self._used - taken, 0.0) + min(taken + needed, limit) - limit
        return Budget(
            name, self._per_minute, limit, limit - self._used, self._used / rate, max(lacking / rate, 0.0)
        )


class RateLimits:
    """The limits of all accounts (numbers of API keys).

    Args:
        limits: By account.

    Attributes:
        num_servers: API servers among which the limits are divided.
    """

    def __init__(self, limits: Sequence[KeyLimits]) -> None:
        self.num_servers = 1
        self._buckets = [(Bucket(of_key.rpm), Bucket(of_key.tpm)) for of_key in limits]
        self._limits = limits

    def take(
        self, account: int, requests: int, tokens: int, now: float, taken: tuple[int, int] = (0, 0)
    ) -> Budget | None:
        """Takes requests and the tokens of their prompts.

        Args:
            taken: Requests and tokens that came with them and have been taken already.

        Returns: None if they were taken; otherwise the limit that has not enough left for them, and if both
        have not, the one that takes longer to have it.
        """
        lacking = [one for one in self.budgets(account, now, requests, tokens, taken) if one.wait_s > 0]
        if lacking:
            return max(lacking, key=lambda one: one.wait_s)
        self._add(account, requests, tokens)
        return None

    def give_back(self, account: int, requests: int, tokens: int) -> None:
        """Gives back what `take` took for requests that were not started."""
        self._add(account, -requests, -tokens)

    def generated(self, account: int, tokens: int) -> None:
        """Takes output tokens once they are generated: a request overdraws by its outputs at most."""
        self._add(account, 0, tokens)

    def budgets(
        self, account: int, now: float, requests: int = 0, tokens: int = 0, taken: tuple[int, int] = (0, 0)
    ) -> list[Budget]:
        """What each limit of an account leaves, and how long it lacks this much."""
        if account >= len(self._limits):
            return []
        named = zip(("requests", "tokens"), self._buckets[account], self._limits[account], strict=True)
        amounts = zip((requests, tokens), taken, strict=True)
        return [
            bucket.budget(name, now, needed, self.num_servers, before)
            for (name, bucket, limit), (needed, before) in zip(named, amounts, strict=True)
            if limit < math.inf
        ]

    def _add(self, account: int, requests: int, tokens: int) -> None:
        if account < len(self._limits):
            for bucket, amount in zip(self._buckets[account], (requests, tokens), strict=True):
                bucket.take(amount)
