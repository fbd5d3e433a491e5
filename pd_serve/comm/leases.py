"""Leases: a process that sends nothing for the time of its lease counts as gone."""

import asyncio

from pd_serve.comm.timing import HEARTBEAT_S


class Leases:
    """Leases of other processes, by name. Call `expired` at least every `HEARTBEAT_S`.

    While this process itself is suspended (SIGSTOP, a sleeping machine), it receives no messages. That time
    does not count.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._renewed_at: dict[str, float] = {}
        self._checked_at = self._loop.time()

    def renew(self, name: str) -> None:
        self._renewed_at[name] = self._loop.time()

    def drop(self, name: str) -> None:
        """Ends a lease. Unknown names are ignored."""
        self._renewed_at.pop(name, None)

    def expired(self) -> list[str]:
        """Names whose lease has run out. They remain until they are dropped."""
        now = self._loop.time()
        suspended_s = now - self._checked_at - HEARTBEAT_S
        self._checked_at = now
        if suspended_s > HEARTBEAT_S:
            self._renewed_at = {name: at + suspended_s for name, at in self._renewed_at.items()}
        return [name for name, at in self._renewed_at.items() if now - at > self._lease_s]
