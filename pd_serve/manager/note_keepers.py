"""The processes that keep the manager's notes, by which a manager learns that another one has taken over."""

import asyncio
import contextlib
from collections.abc import Collection
from functools import partial
from typing import Any

import ray

from pd_serve.comm.membership import SCHEDULER
from pd_serve.comm.timing import HEARTBEAT_S, TERM_CHECK_S
from pd_serve.errors import EngineDeadError
from pd_serve.manager.instance_processes import InstanceProcesses
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.ray_calls import in_time, settled

#: Ray's namespace of actors that outlive the manager. Their names are "service:name".
NAMESPACE = "pd_serve"

#: Time in which processes answer that they have the notes.
ANSWER_S = 3.0


def named_actors(service: str, without: Collection[str] = ()) -> dict[str, Any]:
    """Asks Ray's head for the actors of a service, by the name behind the service's. Blocks.

    Args:
        without: Names that are left out.
    """
    prefix = f"{service}:"
    found = {}
    for row in ray.util.list_named_actors(all_namespaces=True):
        name = row["name"].removeprefix(prefix)
        if row["namespace"] == NAMESPACE and row["name"].startswith(prefix) and name not in without:
            with contextlib.suppress(ValueError):  # the actor has died meanwhile
                found[name] = ray.get_actor(row["name"], NAMESPACE)
    return found


class NoteKeepers:
    """Gives the notes to the instances.

    A manager that is cut off reaches only instances that know no other manager. What it wants to end then may
    belong to another manager when it is reached again. So Ray's head, which knows the instances of both, is
    asked before.

    Args:
        service: Name of the service; None if all actors end with this process: there is no other manager.
        processes: Those of the instances that this manager knows.
    """

    def __init__(self, service: str | None, processes: InstanceProcesses) -> None:
        self._service = service
        self._processes = processes
        self._others: list[Any] = []
        self._notes: ManagerNotes | None = None

    async def give(self, notes: ManagerNotes) -> int:
        """See `Launcher.keep_notes`. Those that another manager has started are asked, too."""
        self._notes = notes
        actors = [*(process.actor for process in self._processes), *self._others]
        calls = [asyncio.ensure_future(settled(actor.keep_notes.remote(notes))) for actor in actors]
        done, _ = await asyncio.wait(calls, timeout=ANSWER_S) if calls else (set(), set())
        return max((task.result() or 0 for task in done), default=0)

    async def watch(self) -> None:
        """Looks for those that another manager has started, until cancelled."""
        while True:
            with contextlib.suppress(EngineDeadError):
                await self._find_others()
            await asyncio.sleep(TERM_CHECK_S)

    async def are_ours(self) -> bool:
        """Whether no other manager has taken over. Raises: EngineDeadError: Ray does not answer."""
        if self._service is None or self._notes is None:
            return True
        await self._find_others()
        return await self.give(self._notes) <= self._notes.term

    async def wait(self) -> bool:
        """The same, when Ray answers."""
        while True:
            with contextlib.suppress(EngineDeadError):
                return await self.are_ours()
            await asyncio.sleep(HEARTBEAT_S)

    async def _find_others(self) -> None:
        known = {SCHEDULER, *(process.name for process in self._processes)}
        try:
            found = await in_time(partial(named_actors, self._service or "", known))
        except ray.exceptions.RayError as error:
            raise EngineDeadError(f"Ray does not answer: {error}") from error
        self._others = list(found.values())
