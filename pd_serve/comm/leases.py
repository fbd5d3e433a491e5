"""Leases: a process that sends nothing for the time of its lease counts as gone. Engines that hang."""

import asyncio

from migration.engine_interface import StepProgress
from pd_serve.comm.timing import FIRST_STEPS, FIRST_STEPS_S, HEARTBEAT_S, ORPHAN_S, STEP_S
from pd_serve.errors import EngineDeadError


class LeaseClock:
    """The time in which this process receives messages of others.

    Every other process sends something each `HEARTBEAT_S`. The clock stops while this process is suspended
    (SIGSTOP, a sleeping machine) or cut off from all others, in either direction: their silence means nothing
    then.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received_at = self._loop.time()
        self._seconds = 0.0

    def on_message(self) -> None:
        """A message has been received of a process that hears this one."""
        now = self._loop.time()
        self._seconds += min(now - self._received_at, 2 * HEARTBEAT_S)
        self._received_at = now

    def time(self) -> float:
        """Seconds that it has run."""
        return self._seconds


class Leases:
    """Leases of other processes, by name."""

    def __init__(self, lease_s: float, clock: LeaseClock) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._renewed_at: dict[str, float] = {}

    def renew(self, name: str) -> None:
        self._renewed_at[name] = self._clock.time()

    def begin(self, name: str) -> None:
        """Begins a lease. One that has begun already goes on."""
        self._renewed_at.setdefault(name, self._clock.time())

    def drop(self, name: str) -> None:
        """Ends a lease. Unknown names are ignored."""
        self._renewed_at.pop(name, None)

    def expired(self) -> list[str]:
        """Names whose lease has run out. They remain until they are dropped."""
        oldest = self._clock.time() - self._lease_s
        return [name for name, at in self._renewed_at.items() if at < oldest]


class Silence:
    """The time for which other processes have sent nothing.

    It is counted in heartbeats of the process itself, so that a suspension of the process does not count.

    Attributes:
        seconds: Since the last message.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_message(self) -> None:
        """One of the processes has sent something."""
        self.seconds = 0.0

    def on_heartbeat(self, interval_s: float) -> None:
        """Call this every `interval_s`."""
        self.seconds += interval_s


class OrphanTimer(Silence):
    """Ends an instance or a scheduler that belongs to no service any more.

    Messages of the manager and of API servers count.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def on_heartbeat(self, interval_s: float) -> None:
        """See `Silence`. Raises: EngineDeadError: no message for `ORPHAN_S`."""
        super().on_heartbeat(interval_s)
        if self.seconds > ORPHAN_S:
            raise EngineDeadError(
                f"neither manager nor API servers have sent {self._process} anything for {ORPHAN_S:.0f} s"
            )


class StepWatch:
    """Notices an engine that hangs in a step while its process goes on to send heartbeats.

    Time is counted in heartbeats of the process itself, so that a suspension of the process does not count.

    Attributes:
        step_s: Time that the step, or call, in progress has taken; 0 while the engine is idle.
        hangs: It has exceeded its bound.
    """

    def __init__(self) -> None:
        self.step_s = 0.0
        self.hangs = False
        self._turns = -1

    def on_heartbeat(self, interval_s: float, progress: StepProgress) -> None:
        """Call this every `interval_s`."""
        stands = progress.is_busy and progress.turns == self._turns
        self.step_s = self.step_s + interval_s if stands else 0.0
        self._turns = progress.turns
        self.hangs = self.step_s > (STEP_S if progress.steps >= FIRST_STEPS else FIRST_STEPS_S)
