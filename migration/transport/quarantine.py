"""Local blocks that a failed read may still write to."""

import asyncio
from collections.abc import Iterable, Sequence


class Quarantine:
    """Blocks that must not be freed yet, although the read into them has failed. Belongs to one event loop.

    A one-sided read cannot be taken back for certain. Its error is reported at once, so that the request goes
    on elsewhere; its blocks wait here until the transport knows that nothing writes to them any more.

    Args:
        parts: What is in one of these is in here, too.
    """

    def __init__(self, *parts: "Quarantine") -> None:
        self._parts = parts
        self._own: dict[asyncio.Future[None], frozenset[int]] = {}

    @property
    def _writing(self) -> dict["asyncio.Future[None]", frozenset[int]]:
        writing = dict(self._own)
        for part in self._parts:
            writing |= part._writing
        return writing

    def add(self, blocks: Iterable[int], quiet: "asyncio.Future[None]") -> None:
        """Keeps blocks until `quiet` is done, which has a bound of its own."""
        self._own[quiet] = frozenset(blocks)
        quiet.add_done_callback(self._own.pop)

    def holds(self, blocks: Sequence[int]) -> bool:
        """Whether any of these blocks is in here."""
        return any(not held.isdisjoint(blocks) for held in self._writing.values())

    async def wait_for(self, blocks: Sequence[int]) -> None:
        """Returns when none of these blocks is in here."""
        while self.holds(blocks):
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)

    def problems(self) -> list[str]:
        """For an integrity check: what is in here; empty when the transport is at rest."""
        blocks = frozenset[int]().union(*self._writing.values())
        return [f"{len(blocks)} KV blocks wait until no failed read writes to them"] if blocks else []
