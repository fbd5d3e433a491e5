"""Leases: a process that renews nothing for a while counts as gone."""

import asyncio

from pd_serve.comm.timing import HEARTBEAT_S


class Leases:
    """Leases of other processes, by name. `expired` is asked every `HEARTBEAT_S` or more often.

    While this process is held up itself (a suspended machine, a stopped process), it takes no messages. This
    time does not count.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._renewed_at: dict[str, float] = {}
        self._asked_at = self._loop.time()

    def renew(self, name: str) -> None:
        self._renewed_at[name] = self._loop.time()

    def drop(self, name: str) -> None:
        """Ends a lease. Unknown names are ignored."""
        self._renewed_at.pop(name, None)

    def expired(self) -> list[str]:
        """Names whose lease has run out. They remain until they are dropped."""
        now = self._loop.time()
        held_up_s = now - self._asked_at - HEARTBEAT_S
        self._asked_at = now
        if held_up_s > HEARTBEAT_S:
            self._renewed_at = {name: at + held_up_s for name, at in self._renewed_at.items()}
        return [name for name, at in self._renewed_at.items() if now - at > self._lease_s]
