"""Faults of the messages of a simulated network: lost, doubled or held back, by their type."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

#: A doubled message comes a second time after this long.
DOUBLED_AFTER_S = 0.05

Link = tuple[str, str]


class MessageFaults:
    """What happens to messages on their way. Without faults, messages of one sender stay in order.

    Attributes:
        is_lost: Decides about each message, whatever its type; for random losses.
    """

    def __init__(self) -> None:
        self.is_lost: Callable[[], bool] = lambda: False
        self._losses: dict[type, float] = defaultdict(float)
        self._doubled: set[type] = set()
        self._held_types: set[type] = set()
        self._held: dict[Link, list[Callable[[], None]]] = {}
        self._isolated: set[str] = set()

    def lose(self, message: type, times: float = float("inf")) -> None:
        """Loses the next messages of this type."""
        self._losses[message] = times

    def double(self, message: type) -> None:
        """Delivers every message of this type a second time, later."""
        self._doubled.add(message)

    def hold(self, message: type) -> None:
        """Holds the first message of this type, and all behind it on its link, until `release`."""
        self._held_types.add(message)

    def isolate(self, *names: str) -> None:
        """Loses all messages from and to these nodes."""
        self._isolated.update(names)

    def release(self) -> None:
        """Delivers the messages that are held, in order, and holds no others."""
        self._held_types.clear()
        held, self._held = self._held, {}
        for deliveries in held.values():
            for deliver in deliveries:
                deliver()

    def heal(self) -> None:
        """Ends all faults, and delivers the messages that are held."""
        self.is_lost = lambda: False
        self._losses.clear()
        self._doubled.clear()
        self._isolated.clear()
        self.release()

    def transmit(self, link: Link, message: type, deliver: Callable[[], None]) -> None:
        """Delivers one message from `link[0]` to `link[1]`, or not, or later."""
        if self._isolated.intersection(link) or self.is_lost():
            return
        if self._losses[message] > 0:
            self._losses[message] -= 1
            return
        if message in self._held_types:
            self._held.setdefault(link, [])
        self._pass_on(link, deliver)
        if message in self._doubled:
            asyncio.get_running_loop().call_later(DOUBLED_AFTER_S, self._pass_on, link, deliver)

    def _pass_on(self, link: Link, deliver: Callable[[], None]) -> None:
        if link in self._held:
            self._held[link].append(deliver)
        else:
            deliver()
