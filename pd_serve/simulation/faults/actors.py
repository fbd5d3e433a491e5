"""The actors of instances on the simulated platform, and the faults of their starts."""

import asyncio
from dataclasses import dataclass, field

from pd_serve.comm.membership import InstanceInfo
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulation.faults.process_loop import SimulatedProcess
from pd_serve.simulation.simulated_instance import SimulatedInstance


@dataclass(eq=False)
class SimulatedActor:
    """An instance's process.

    Attributes:
        started: Settled when the instance is ready, or will never be.
        instance: None before that.
        notes: The latest notes of a manager.
    """

    name: str
    process: SimulatedProcess
    faults: EngineFaults
    started: "asyncio.Future[InstanceInfo] | None" = None
    instance: SimulatedInstance | None = None
    notes: ManagerNotes | None = None

    def keep(self, notes: ManagerNotes) -> None:
        if self.notes is None or notes.age > self.notes.age:
            self.notes = notes

    @property
    def is_starting(self) -> bool:
        return self.process.is_alive and self.started is not None and not self.started.done()


@dataclass
class StartFaults:
    """What happens to the instances that are started next.

    Attributes:
        delay_s: Added to the time of a start.
        failures: Number of starts that fail.
        early_deaths: Number of instances that die `dies_after_s` after they were ready.
        lost_starts: Number of orders to start an instance that are lost, or their answers.
        lost_stops: Number of orders to end an instance that do nothing.
        survivors: The instances that these orders should have ended.
        hanging: Instances that hang for ever. An order to end one of them is not lost: nothing else would.
        starved: There are no resources for another instance.
        ended_at: The last of these failures and deaths, on the clock of the simulation. A start that takes
            longer than `START_TIMEOUT_S` is given up, and fails then.
    """

    delay_s: float = 0.0
    failures: int = 0
    early_deaths: int = 0
    dies_after_s: float = 1.0
    lost_starts: int = 0
    lost_stops: int = 0
    survivors: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    starved: bool = False
    ended_at: float = 0.0
