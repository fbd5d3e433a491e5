"""Interface between the manager and the platform that runs its processes, and the manager's notes."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from pd_serve.comm.membership import ApiServerInfo, InstanceInfo, LoraAdapter
from pd_serve.comm.timing import START_ORDER_S
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig

#: Terms of managers that take over from the same one differ by less than this.
TERM_STEP = 1_000_000


@dataclass(frozen=True, slots=True)
class RestartNotes:
    """A rolling restart that is under way.

    Attributes:
        total: Number of instances to replace.
        remaining: Instances that are still to be replaced; the first one now.
        replacement: Instance that replaces the first one; "" before its start.
    """

    total: int
    remaining: list[str]
    replacement: str = ""


@dataclass(frozen=True, slots=True)
class ManagerNotes:
    """State of the manager that the next manager needs. The instances keep the latest notes.

    Attributes:
        term: Term of the manager that wrote the notes; see `Membership.term`.
        version: Number of changes.
        wanted: Wanted number of instances by role.
        next_numbers: Number of the next instance id, by role. Ids are not used again.
        drained_by_operator: Instances that an operator drains.
        stopping: Those of them that are stopped as soon as they are empty.
        stopped: Those of them by which an operator has made a pool smaller, with its role.
        roles: Present roles of the instances.
        restart: The rolling restart that is under way; None if there is none.
        api_servers: API servers that have joined, by name.
        lora_adapters: See `Membership.lora_adapters`.
        lora_flags: Names of adapters that were loaded because a flag names them.
    """

    term: int = 1
    version: int = 0
    wanted: dict[str, int] = field(default_factory=dict)
    next_numbers: dict[str, int] = field(default_factory=dict)
    drained_by_operator: list[str] = field(default_factory=list)
    stopping: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    restart: RestartNotes | None = None
    api_servers: dict[str, ApiServerInfo] = field(default_factory=dict)
    lora_adapters: list[LoraAdapter] = field(default_factory=list)
    lora_flags: list[str] = field(default_factory=list)

    @property
    def age(self) -> tuple[int, int]:
        """Sort key: later notes have a higher one."""
        return self.term, self.version


class Launcher(Protocol):
    """Starts, watches and ends processes: `pd_serve.manager.ray_launcher.RayLauncher`, and a simulated one.

    Attributes:
        on_lost: Called with the id of an instance whose process has died.
    """

    on_lost: Callable[[str], None]

    async def launch(self, name: str, placement: Placement) -> None:
        """Starts the process of an instance, which begins its imports. Idempotent.

        Raises: EngineDeadError: The platform does not answer.
        """
        ...

    def waits_for(self, name: str) -> str:
        """The resources that a launched instance waits for, as a text; "" if it has them."""
        ...

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        """Loads the model in a launched instance. Returns when it is ready. Raises: EngineDeadError.

        An instance whose start is cancelled is ended, unless the manager has left it to the next one.
        """
        ...

    def leave_starts(self) -> None:
        """Leaves the starts that are cancelled from now on to the next manager: it may have adopted them."""
        ...

    async def stop_instance(self, name: str) -> None:
        """Stops an instance, by force if it does not end by itself."""
        ...

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        """Finds the running instances of the last manager and their latest notes."""
        ...

    async def keep_notes(self, notes: ManagerNotes) -> int:
        """Gives the notes to every instance, which keeps the later ones. Returns the highest term kept."""
        ...

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        """Starts the scheduler's process. Returns its address and process id.

        Raises:
            EngineDeadError: It does not start, or one of a former manager was there, which is ended.
        """
        ...

    async def stop_scheduler(self) -> None:
        """Ends the process of the last started scheduler by force."""
        ...

    async def scheduler_ended(self) -> None:
        """Returns when the process of the last started scheduler has ended."""
        ...


async def answered(order: Callable[[], Awaitable[InstanceInfo]]) -> InstanceInfo:
    """Orders a start again and again until one order is answered: an order or its answer may be lost.

    Args:
        order: Orders the start of one instance. The instance starts once, and answers every order.
    """
    orders: list[asyncio.Future[InstanceInfo]] = []
    try:
        while not any(one.done() for one in orders):
            orders.append(asyncio.ensure_future(order()))
            await asyncio.wait(orders, timeout=START_ORDER_S, return_when=asyncio.FIRST_COMPLETED)
        return next(one for one in orders if one.done()).result()
    finally:
        for one in orders:
            if not one.cancel() and not one.cancelled():
                one.exception()  # otherwise asyncio logs it as never retrieved
