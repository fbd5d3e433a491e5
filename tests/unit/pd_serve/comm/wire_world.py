"""Inboxes and keys for tests with real sockets on loopback."""

import asyncio
from collections.abc import Callable, Sequence

from pd_serve.comm.wire import CurveKeys, Wire

MakeWire = Callable[..., Wire]

KEYS = CurveKeys.generate()


class Inbox:
    """Keeps the messages of a wire."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, object, list[bytes]]] = []
        self._arrived = asyncio.Event()

    def on_message(self, sender: str, message: object, payload: Sequence[bytes]) -> None:
        self.messages.append((sender, message, list(payload)))
        self._arrived.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.messages) < count:
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def received(self) -> list[tuple[str, str]]:
        """(sender, role) of the `SetRole` messages, which the tests count with."""
        return [(sender, getattr(message, "role", "")) for sender, message, _ in self.messages]
