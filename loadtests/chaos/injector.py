"""Carries out the faults of a schedule."""

import asyncio
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from loadtests.chaos.operations import Operator
from loadtests.chaos.schedule import Fault, Target
from loadtests.chaos.targets import choose
from loadtests.started_service import StartedService

#: Maximum wait for a process of a wanted kind. Starts are delayed by Ray, and after failed ones by a backoff.
TARGET_WAIT_S = 240.0

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Hit:
    """A process that a fault affected."""

    target: Target
    name: str
    pid: int


@dataclass(slots=True)
class FaultRecord:
    """A fault that was carried out.

    Attributes:
        at_s: Seconds since the load began.
        until_s: End of a freeze; the same as `at_s` for a kill.
        operation: The operation that had begun before, in words.
        missing: Kinds of which no process was found in time.
    """

    fault: Fault
    at_s: float = 0.0
    until_s: float = 0.0
    hits: list[Hit] = field(default_factory=list)
    operation: str = ""
    missing: list[Target] = field(default_factory=list)

    def __str__(self) -> str:
        how = "kill" if self.fault.freeze_s is None else f"freeze {self.fault.freeze_s:.1f} s"
        names = " and ".join(f"{hit.name} (pid {hit.pid})" for hit in self.hits) or "nothing"
        during = f", during {self.operation}" if self.operation else ""
        missing = f"; there was no {', '.join(self.missing)}" if self.missing else ""
        return f"{how} {names}{during}{missing}"


class FaultInjector:
    """Signals processes of a service.

    Args:
        cluster: Returns the last body of `GET /cluster`.
        active: Returns the X-Request-Id of the running streams.
        now_s: Seconds since the load began.
    """

    def __init__(
        self,
        service: StartedService,
        operator: Operator,
        cluster: Callable[[], Mapping[str, Any]],
        active: Callable[[], list[str]],
        now_s: Callable[[], float],
    ) -> None:
        self._service = service
        self._operator = operator
        self._cluster = cluster
        self._active = active
        self._now_s = now_s
        self._frozen: dict[int, asyncio.Task[None]] = {}
        self.records: list[FaultRecord] = []

    async def carry_out(self, fault: Fault) -> FaultRecord:
        """Waits for the processes that the fault affects, begins its operation, and signals them."""
        dice, record = random.Random(fault.dice), FaultRecord(fault)
        if fault.during is not None:
            record.operation = self._operator.begin(fault.during, self._cluster(), self._active(), dice)
            await asyncio.sleep(fault.lead_s)
        chosen: list[tuple[Target, str, psutil.Process]] = []
        for target in fault.targets:
            found = await self._wait_for(target, dice, {process.pid for _, _, process in chosen})
            if found is None:
                record.missing.append(target)
            else:
                chosen.append((target, *found))
        record.at_s = record.until_s = self._now_s()
        number = signal.SIGKILL if fault.freeze_s is None else signal.SIGSTOP
        for target, name, process in chosen:
            if self._service.processes.send(process, number):
                record.hits.append(Hit(target, name, process.pid))
                if fault.freeze_s is not None:
                    self._frozen[process.pid] = asyncio.create_task(self._thaw(process, fault.freeze_s))
        record.until_s += fault.freeze_s or 0.0
        self.records.append(record)
        return record

    async def finish(self) -> None:
        """Returns when every frozen process continues."""
        await asyncio.gather(*self._frozen.values())

    async def _wait_for(
        self, target: Target, dice: random.Random, taken: set[int]
    ) -> tuple[str, psutil.Process] | None:
        deadline = self._now_s() + TARGET_WAIT_S
        while self._now_s() < deadline:
            frozen = set(self._frozen)  # those that continue meanwhile can be chosen
            if (found := choose(self._service, target, self._cluster(), dice, taken | frozen)) is not None:
                return found
            await asyncio.sleep(POLL_S)
        return None

    async def _thaw(self, process: psutil.Process, after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
        finally:
            self._service.processes.send(process, signal.SIGCONT)
            self._frozen.pop(process.pid, None)
