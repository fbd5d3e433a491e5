"""Drains instances, and stops them when they are empty."""

import asyncio
from collections.abc import Awaitable, Callable, Set

from migration.tasks import BackgroundTasks
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import SetDraining
from pd_serve.comm.timing import DRAIN_TIMEOUT_S, POLL_S, STOP_PATIENCE_S
from pd_serve.manager.decision_log import DecisionLog
from pd_serve.manager.register import InstanceRegister
from router.load import InstanceLoad


class Stopper:
    """Drains instances, and stops those that are leaving.

    Args:
        stop: Ends the process of an instance.
        is_used: Whether an API server may still have requests on an instance that is leaving.
        on_change: Called when `leaving` or the register has changed.

    Attributes:
        drained_by_operator: Instances that an operator drains. The scheduler neither uses nor stops them.
    """

    def __init__(
        self,
        register: InstanceRegister,
        log: DecisionLog,
        wire: MessageWire,
        stop: Callable[[str], Awaitable[None]],
        is_used: Callable[[str], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._register = register
        self._log = log
        self._wire = wire
        self._stop = stop
        self._is_used = is_used
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._take_downs: dict[str, asyncio.Task[None]] = {}
        self.drained_by_operator: set[str] = set()

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def leaving(self) -> Set[str]:
        """Instances that are stopped as soon as they are empty."""
        return self._take_downs.keys()

    def drain(self, instance_id: str, draining: bool, reason: str) -> None:
        """Drains an instance for the operator, or uses it again, also if the scheduler has drained it."""
        if draining != (instance_id in self.drained_by_operator):
            self._cancel(instance_id)
        if draining:
            self.drained_by_operator.add(instance_id)
        else:
            self.drained_by_operator.discard(instance_id)
        self._wire.send(instance_id, SetDraining(draining, by_operator=True))
        self._log.add(f"{instance_id} is {'drained' if draining else 'used again'}: {reason}")

    def stop_drained(self, instance_id: str, reason: str) -> None:
        """Stops an instance that the operator drains, when it is empty or after `DRAIN_TIMEOUT_S`."""
        self._begin(instance_id, reason, DRAIN_TIMEOUT_S)

    def stop_empty(self, instance_id: str, reason: str) -> None:
        """Stops an instance that the scheduler has drained and found empty."""
        if instance_id not in self.drained_by_operator:
            self._begin(instance_id, reason, STOP_PATIENCE_S)

    @property
    def stopping(self) -> list[str]:
        """Instances that are stopped for the operator, which the next manager goes on with."""
        return sorted(self.leaving & self.drained_by_operator)

    def on_report(self, load: InstanceLoad) -> None:
        """Repeats the operator's order to an instance that it has not reached."""
        drained = load.instance_id in self.drained_by_operator
        if load.instance_id in self._register and load.drained_by_operator != drained:
            self._wire.send(load.instance_id, SetDraining(drained, by_operator=True))

    def forget(self, instance_id: str) -> None:
        """Removes an instance that has died."""
        self.drained_by_operator.discard(instance_id)

    def _begin(self, instance_id: str, reason: str, patience_s: float) -> None:
        if instance_id in self._register and instance_id not in self._take_downs:
            take_down = self._take_down(instance_id, reason, self._loop.time() + patience_s)
            self._take_downs[instance_id] = self._tasks.start(take_down)
            self._on_change()

    def _cancel(self, instance_id: str) -> None:
        if (task := self._take_downs.pop(instance_id, None)) is not None:
            task.cancel()
            self._on_change()

    async def _take_down(self, instance_id: str, reason: str, deadline: float) -> None:
        try:
            if await self._is_drained(instance_id, deadline):
                role = self._register.role_of(instance_id)
                self._register.remove(instance_id)
                self._on_change()
                await self._stop(instance_id)
                self._log.add(f"{instance_id} is stopped: {reason}")
                self._log.count("stop", role)
        finally:
            if self._take_downs.get(instance_id) is asyncio.current_task():
                del self._take_downs[instance_id]
            if instance_id not in self._register:
                self.drained_by_operator.discard(instance_id)
            self._on_change()

    async def _is_drained(self, instance_id: str, deadline: float) -> bool:
        """Returns True when an instance is to be stopped, False if it has died or is used again."""
        by_operator = instance_id in self.drained_by_operator
        while True:
            await asyncio.sleep(POLL_S)
            if instance_id not in self._register:
                return False
            if (load := self._register.load_of(instance_id)) is not None:
                if not by_operator and not load.draining:
                    return False  # the scheduler uses it again
                if load.draining and load.is_empty and not self._is_used(instance_id):
                    return True
            if self._loop.time() > deadline:
                return True
