"""Fair shares of the queue among API keys: virtual token counters.

Of the keys whose requests wait, the one that has been served the fewest tokens goes next. A key that begins
to wait starts at the least counter of those that wait, so that idle time is no credit. Counters last while
requests wait: without a queue there is nothing to share.

Source: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024 (VTC, algorithm 2).
"""

from collections import Counter

#: Cost of a prompt token and of an output token. Source: as above, section 5.1.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


class FairShare:
    """Counters of the accounts (numbers of API keys) of one queue."""

    def __init__(self) -> None:
        self._served: dict[int, float] = {}
        self._waiting: Counter[int] = Counter()

    @property
    def num_waiting(self) -> int:
        """Accounts with requests that wait."""
        return len(self._waiting)

    def served(self, account: int) -> float:
        """Weighted tokens charged to an account; only differences between accounts mean something."""
        return self._served.get(account, 0.0)

    def begins_to_wait(self, account: int) -> None:
        """Counts a request of an account that has joined the queue."""
        if not self._waiting[account]:
            self._served[account] = max(self.served(account), self._least())
        self._waiting[account] += 1

    def starts(self, account: int, prompt_tokens: int) -> None:
        """Charges the prompt of a request that was sent to an instance, from the queue or past it."""
        self._add(account, PROMPT_WEIGHT * prompt_tokens)

    def generated(self, account: int, tokens: int) -> None:
        """Charges output tokens that were delivered."""
        self._add(account, OUTPUT_WEIGHT * tokens)

    def waits_no_more(self, account: int) -> None:
        """Counts a request of an account no more: it has left the queue."""
        self._waiting[account] -= 1
        if not self._waiting[account]:
            del self._waiting[account]
        if not self._waiting:
            self._served.clear()

    def _add(self, account: int, cost: float) -> None:
        if self._waiting:
            self._served[account] = self._served.get(account, self._least()) + cost

    def _least(self) -> float:
        counters = [self._served[account] for account in self._waiting if account in self._served]
        return min(counters, default=0.0)
