"""Carries out the faults of a schedule on a running cluster, each at its time."""

from collections.abc import Callable

from migration.messages import MigrationMessage, Offer
from pd_serve.comm.messages import AbortRequests
from pd_serve.simulation.faults.effects import Effects
from pd_serve.simulation.faults.process_loop import ProcessLoop
from pd_serve.simulation.faults.schedule import Schedule, ScheduledFault

#: A fault that waits for a message is given up after this time.
WAIT_FOR_MESSAGE_S = 20.0


class Injector:
    """Begins and ends faults.

    Args:
        note: Takes a line of the trace.

    Attributes:
        ended_at: The time at which the last fault has ended.
    """

    def __init__(
        self, schedule: Schedule, loop: ProcessLoop, effects: Effects, note: Callable[[str], None]
    ) -> None:
        self.ended_at = loop.now
        self._schedule = schedule
        self._loop = loop
        self._effects = effects
        self._note = note
        self._pending = len(schedule.faults)
        self._armed: list[ScheduledFault] = []
        self._offered: dict[str, str] = {}  # request by migration

    def open(self) -> None:
        for fault in self._schedule.faults:
            self._loop.outside_at(self._loop.now + fault.at_s, self._begin, fault)

    @property
    def is_done(self) -> bool:
        """Whether all faults have ended."""
        return self._pending == 0

    def on_send(self, sender: str, receiver: str, kind: str, message: object) -> None:
        """A process sends a message of this type."""
        if isinstance(message, Offer):
            self._offered[message.migration_id] = message.request.request_id
        if self._armed:
            for fault in [fault for fault in self._armed if fault.on == kind]:
                self._armed.remove(fault)
                names = {"sender": sender, "receiver": receiver, "request": self._request_of(message)}
                self._loop.outside(self._perform, fault, names)

    def _request_of(self, message: object) -> str:
        """Number of the request that a message is about; "" if it is about none."""
        if isinstance(message, MigrationMessage):
            request_id = self._offered.get(message.migration_id, "")
        elif isinstance(message, AbortRequests):
            request_id = message.request_ids[0]
        else:
            request_id = getattr(message, "request_id", "")
        return request_id.partition(".")[0]

    def _begin(self, fault: ScheduledFault) -> None:
        if fault.on:
            self._armed.append(fault)
            self._loop.outside_at(self._loop.now + WAIT_FOR_MESSAGE_S, self._disarm, fault)
        else:
            self._perform(fault, {})

    def _disarm(self, fault: ScheduledFault) -> None:
        if fault in self._armed:
            self._armed.remove(fault)
            self._note(f"fault: {fault} has not happened")
            self._pending -= 1

    def _perform(self, fault: ScheduledFault, names: dict[str, str]) -> None:
        done, end = self._effects.begin(fault, names)
        self._note(f"fault: {fault} ({done})" if done else f"fault: {fault}")
        self.ended_at = self._loop.now
        if end is None or not fault.for_s:
            self._pending -= 1
        else:
            self._loop.outside_at(self._loop.now + fault.for_s, self._end, fault, end)

    def _end(self, fault: ScheduledFault, end: Callable[[], None]) -> None:
        end()
        self._note(f"end of: {fault}")
        self.ended_at = self._loop.now
        self._pending -= 1
