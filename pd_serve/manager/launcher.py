"""The seam between the manager and what runs its processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pd_serve.comm.membership import ApiServerInfo, InstanceInfo
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig


@dataclass(frozen=True, slots=True)
class ManagerNotes:
    """What the next manager has to know and cannot see. The instances keep it; a later version replaces it.

    Attributes:
        term: Of the manager that wrote it; see `Membership.term`.
        version: Counts the changes.
        wanted: Wanted number of instances by role.
        next_numbers: Number of the next instance id, by role. Ids are not used again.
        drained_by_operator: Instances that an operator drains.
        api_servers: Those that have joined, by name.
    """

    term: int = 1
    version: int = 0
    wanted: dict[str, int] = field(default_factory=dict)
    next_numbers: dict[str, int] = field(default_factory=dict)
    drained_by_operator: list[str] = field(default_factory=list)
    api_servers: dict[str, ApiServerInfo] = field(default_factory=dict)

    @property
    def age(self) -> tuple[int, int]:
        """The higher one of two is of the later notes."""
        return self.term, self.version


class Launcher(Protocol):
    """Starts, watches and ends processes: `pd_serve.manager.ray_launcher.RayLauncher`, and a simulated one.

    Attributes:
        on_lost: Called with the id of an instance whose process has died.
    """

    on_lost: Callable[[str], None]

    def launch(self, name: str, placement: Placement) -> None:
        """Starts the process of an instance, which begins to import what it needs. Idempotent."""
        ...

    def waits_for(self, name: str) -> str:
        """What a launched instance waits for, in words; "" if for nothing but itself."""
        ...

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Gives a launched instance its model and waits until it is ready. Raises: EngineDeadError."""
        ...

    async def stop_instance(self, name: str) -> None:
        """Stops an instance, by force if it does not end by itself."""
        ...

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        """Finds the running instances of the last manager, and its latest notes."""
        ...

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """Has every instance keep the notes, unless it has later ones. Returns the highest term there."""
        ...

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        """Starts the scheduler's process. Returns its address and process id. Raises: EngineDeadError."""
        ...

    async def scheduler_ended(self) -> None:
        """Returns when the process of the scheduler that was started last is dead."""
        ...
