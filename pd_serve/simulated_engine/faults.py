"""Faults that a simulated engine can be made to have, for tests of what depends on it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from migration.errors import DestinationRefusedError, Refusal
from migration.messages import RequestId


class PoisonError(Exception):
    """An engine has died of a request that it was made to die of."""


@dataclass
class EngineFaults:
    """Delays and refusals of an engine's calls, by the call's name (`reserve`, `commit`, `release`...).

    Attributes:
        delays_s: Time that a call waits before the engine sees it.
        refusals: What the next calls raise, the first one first.
        always_refused: What all calls raise.
        hang_s: Time by which the next step is longer.
        poison: Numbers of requests, as their ids begin, whose computation kills the engine.
    """

    delays_s: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, deque[Refusal]] = field(default_factory=dict)
    always_refused: dict[str, Refusal] = field(default_factory=dict)
    hang_s: float = 0.0
    poison: set[int] = field(default_factory=set)

    def refuse_next(self, call: str, refusal: Refusal) -> None:
        """Makes one more call of this name fail."""
        self.refusals.setdefault(call, deque()).append(refusal)

    def begin_step(self, prefilled: list[RequestId], on_death: Callable[[BaseException], None]) -> float:
        """A step begins that computes the prompts of these requests.

        Returns:
            Time by which the step is longer, in seconds.
        """
        if self.poison and any(int(i.partition(".")[0]) in self.poison for i in prefilled):
            on_death(PoisonError("a request has killed the engine"))
        hang_s, self.hang_s = self.hang_s, 0.0
        return hang_s

    async def before(self, call: str) -> None:
        """Raises: DestinationRefusedError: the call is to fail."""
        if delay_s := self.delays_s.get(call):
            await asyncio.sleep(delay_s)
        pending = self.refusals.get(call)
        refusal = pending.popleft() if pending else self.always_refused.get(call)
        if refusal is not None:
            raise DestinationRefusedError(refusal.code, refusal.text)
