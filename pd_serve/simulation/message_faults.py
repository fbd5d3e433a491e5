"""Message faults of a simulated network: messages of a type are lost, duplicated or held."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

#: Delay of the duplicate of a message.
DOUBLED_AFTER_S = 0.05

Link = tuple[str, str]


class MessageFaults:
    """Faults by type of message and by node. Other messages of one sender stay in order.

    Attributes:
        is_lost: Called for each message; True loses it. For random losses.
        is_doubled: Called for each message; True delivers it a second time, later.
        delay_s: Called for each message; returns a delay, in which later messages overtake it.
    """

    def __init__(self) -> None:
        self._no_random_faults()
        self._losses: dict[type, float] = defaultdict(float)
        self._doubled: set[type] = set()
        self._held_types: set[type] = set()
        self._held: dict[Link, list[Callable[[], None]]] = {}
        self._isolated: set[str] = set()
        self._broken: set[frozenset[str]] = set()

    def lose(self, message: type, times: float = float("inf")) -> None:
        """Loses the next messages of this type."""
        self._losses[message] = times

    def double(self, message: type) -> None:
        """Delivers every message of this type a second time, later."""
        self._doubled.add(message)

    def hold(self, message: type) -> None:
        """Holds the first message of this type, and all later ones on its link, until `release`."""
        self._held_types.add(message)

    def isolate(self, *names: str) -> None:
        """Loses all messages from and to these nodes."""
        self._isolated.update(names)

    def lose_between(self, name: str, other: str) -> None:
        """Loses all messages between two nodes."""
        self._broken.add(frozenset((name, other)))

    def release(self) -> None:
        """Delivers the held messages in order, and holds no others."""
        self._held_types.clear()
        held, self._held = self._held, {}
        for deliveries in held.values():
            for deliver in deliveries:
                deliver()

    def heal(self) -> None:
        """Ends all faults, and delivers the held messages."""
        self._no_random_faults()
        self._losses.clear()
        self._doubled.clear()
        self._isolated.clear()
        self._broken.clear()
        self.release()

    def transmit(self, link: Link, message: type, deliver: Callable[[], None]) -> None:
        """Delivers one message from `link[0]` to `link[1]`, or not, or later."""
        if self._isolated.intersection(link) or frozenset(link) in self._broken or self.is_lost():
            return
        if self._losses[message] > 0:
            self._losses[message] -= 1
            return
        if message in self._held_types:
            self._held.setdefault(link, [])
        if delay_s := self.delay_s():
            asyncio.get_running_loop().call_later(delay_s, self._pass_on, link, deliver)
        else:
            self._pass_on(link, deliver)
        if message in self._doubled or self.is_doubled():
            asyncio.get_running_loop().call_later(DOUBLED_AFTER_S, self._pass_on, link, deliver)

    def _no_random_faults(self) -> None:
        self.is_lost: Callable[[], bool] = lambda: False
        self.is_doubled: Callable[[], bool] = lambda: False
        self.delay_s: Callable[[], float] = lambda: 0.0

    def _pass_on(self, link: Link, deliver: Callable[[], None]) -> None:
        if link in self._held:
            self._held[link].append(deliver)
        else:
            deliver()
