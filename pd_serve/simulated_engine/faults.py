"""Faults that a simulated engine can be made to have, for tests of what depends on it."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from migration.errors import DestinationRefusedError, Refusal


@dataclass
class EngineFaults:
    """Delays and refusals of an engine's calls, by the call's name (`reserve`, `commit`, `release`...).

    Attributes:
        delays_s: Time that a call waits before the engine sees it.
        refusals: What the next calls raise, the first one first.
        always_refused: What all calls raise.
    """

    delays_s: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, deque[Refusal]] = field(default_factory=dict)
    always_refused: dict[str, Refusal] = field(default_factory=dict)

    def refuse_next(self, call: str, refusal: Refusal) -> None:
        """Makes one more call of this name fail."""
        self.refusals.setdefault(call, deque()).append(refusal)

    async def before(self, call: str) -> None:
        """Raises: DestinationRefusedError: the call is to fail."""
        if delay_s := self.delays_s.get(call):
            await asyncio.sleep(delay_s)
        pending = self.refusals.get(call)
        refusal = pending.popleft() if pending else self.always_refused.get(call)
        if refusal is not None:
            raise DestinationRefusedError(refusal.code, refusal.text)
