"""Who is there and how loaded: the instances, as their reports show them."""

import asyncio
from collections.abc import Callable
from typing import Any

from pd_serve.comm.instance_directory import InstanceDirectory
from pd_serve.comm.messages import (
    InstanceInfo,
    LoadReport,
    SchedulerReport,
    StartInstance,
    StopInstance,
    ToApiServer,
)
from pd_serve.comm.wire import Wire
from router.dispatch import can_start
from router.load import InstanceLoad
from router.projected_loads import ProjectedLoads
from router.request import NO_DEMAND, Demand


class InstanceRegistry:
    """Instances come and go through `join` and `leave`; their loads, and the scheduler's wishes, by messages.

    The owner of the instances needs no more than this; the request router adds requests.

    Args:
        on_tokens: Takes what instances send to the token endpoint; None: nothing is for us.
        num_slots: Instances that may live at a time; vLLM's metrics tell them apart by slot.
        owns: Whether it is here that the scheduler asks for instances to be started and stopped.
        waiting: Requests here that no instance has yet; the scheduler is told.
        is_claimed: Whether somebody still has requests at an instance, or on their way there.
        on_scaling: Takes what the scheduler wants started or stopped.
        on_decided: Takes what the scheduler has told instances.
        on_silent: Told of an instance that reports nothing any more, in place of `leave`.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        *,
        on_tokens: Callable[[list[bytes]], None] | None = None,
        num_slots: int = 0,
        owns: bool = True,
        waiting: Callable[[], Demand] = lambda: NO_DEMAND,
        is_claimed: Callable[[str], bool] = lambda instance_id: False,
        on_scaling: Callable[[StartInstance | StopInstance], None] = lambda wanted: None,
        on_decided: Callable[[SchedulerReport], None] = lambda report: None,
        on_silent: Callable[[str], object] | None = None,
        book: ProjectedLoads | None = None,
    ) -> None:
        self._is_claimed = is_claimed
        self._on_scaling = on_scaling
        self._on_decided = on_decided
        self._decode_message = wire.decoder(ToApiServer)
        self._book = book or ProjectedLoads()
        self.instances = InstanceDirectory(
            name,
            wire,
            wire.listen(self._on_frames),
            wire.listen(on_tokens) if on_tokens is not None else "",
            num_slots,
            owns=owns,
            waiting=waiting,
            on_silent=on_silent or self.leave,
        )

    async def close(self) -> None:
        await self.instances.close()

    # ---- membership

    def join(self, info: InstanceInfo) -> None:
        self.instances.join(info)

    def leave(self, instance_id: str) -> bool:
        """An instance is dead or stopped. False: it was not known."""
        known = self.instances.leave(instance_id)
        self._book.remove(instance_id)
        return known

    def load_of(self, instance_id: str) -> InstanceLoad | None:
        """Its last report."""
        return self._book.get(instance_id)

    def is_empty(self, instance_id: str) -> bool:
        """Whether no request is there, or on its way there, by all that is known here."""
        load = self._book.get(instance_id)
        if load is not None and (load.running or load.waiting or load.migrating_in or load.migrating_out):
            return False
        return not self._is_claimed(instance_id)

    def last_of_its_kind(self, instance_id: str) -> str | None:
        """Why this instance cannot be done without; None if it can."""
        others = [load for load in self._book if load.instance_id != instance_id and not load.draining]
        if not any(map(can_start, others)):
            return f"{instance_id} is the last instance that takes new requests"
        if any(load.role == "prefill" for load in others) and not any(o.role == "decode" for o in others):
            return f"{instance_id} is the last decode instance"
        return None

    async def wait_for_reports(self) -> None:
        """Returns when every instance that has joined has reported its load."""
        while not all(info.instance_id in self._book for info in self.instances):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    # ---- messages

    def _on_frames(self, frames: list[bytes]) -> None:
        self._on_message(frames[0].decode(), self._decode_message(frames[1]))

    def _on_message(self, sender: str, message: Any) -> None:
        match message:
            case StartInstance() | StopInstance():
                self._on_scaling(message)
            case SchedulerReport():
                self._on_decided(message)
            case LoadReport():
                if sender in self.instances:
                    self.instances.heard(sender)
                    self._book.report(message.load)
                    self._on_load(sender, message)

    def _on_load(self, instance_id: str, report: LoadReport) -> None:
        """For who does more with it."""
