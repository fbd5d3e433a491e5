"""The instances of the cluster as an API server sees them: slots, loads, remote calls."""

import asyncio
from collections.abc import Iterator
from typing import TypeVar

from pd_serve.comm.membership import InstanceInfo, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.requests import Call
from pd_serve.comm.rpc import Request, RpcClient
from pd_serve.comm.timing import POLL_S
from pd_serve.errors import EngineDeadError, PdServeError, UnknownTargetError
from pd_serve.frontend.cached_blocks import CachedBlockFollower
from router.load import InstanceLoad
from router.projected_loads import ProjectedLoads

R = TypeVar("R")


class Instances:
    """The instances in the membership, each with a slot: the index of its engine in vLLM's metrics.

    Args:
        num_slots: Maximum number of instances at a time.

    Attributes:
        slots: All slots.
        loads: Reported loads, corrected by the decisions since.
        cached_blocks: Follows what they have in their prefix caches.
        unreachable: Those whose messages do not arrive, or that receive none. They have no load, so that no
            request is sent to them.
    """

    def __init__(
        self, wire: MessageWire, members: MembershipView, loads: ProjectedLoads, num_slots: int
    ) -> None:
        self.slots = list(range(num_slots))
        self.loads = loads
        self._members = members
        self._slot_of: dict[str, int] = {}
        self.unreachable: set[str] = set()
        self.calls = RpcClient(wire, Call)
        self.cached_blocks = CachedBlockFollower(wire, members, loads.prefixes)

    def __iter__(self) -> Iterator[InstanceInfo]:
        return iter(self._members.instances.values())

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._members.instances

    def num_staying(self) -> int:
        """Instances in reach that are not to be stopped."""
        leaving = self._members.latest.leaving if self._members.latest is not None else []
        return len(self._members.instances.keys() - self.unreachable - set(leaving))

    def slot_of(self, instance_id: str) -> int:
        """Slot of an instance."""
        return self._slot_of[instance_id]

    def slots_by_instance(self) -> dict[str, int]:
        return dict(self._slot_of)

    def add(self, info: InstanceInfo) -> None:
        free = set(self.slots) - set(self._slot_of.values())
        self._slot_of[info.instance_id] = min(free, default=0)
        self.loads.nodes[info.instance_id] = info.node

    def remove(self, instance_id: str) -> None:
        """Removes an instance that died or was stopped. Calls to it fail."""
        self._slot_of.pop(instance_id, None)
        self.unreachable.discard(instance_id)
        self.cached_blocks.remove(instance_id)
        self.loads.remove(instance_id)
        self.calls.peer_lost(instance_id)

    def report(self, load: InstanceLoad) -> None:
        """A load report of an instance in reach has arrived."""
        self.unreachable.discard(load.instance_id)
        self.loads.report(load)

    def set_unreachable(self, instance_id: str) -> None:
        """Gives an instance no requests until `report`."""
        self.unreachable.add(instance_id)
        self.loads.forget(instance_id)

    def load_of(self, instance_id: str) -> InstanceLoad | None:
        """Last reported load of an instance; None before the first report, and while it is unreachable."""
        return self.loads.get(instance_id)

    def role_of(self, instance_id: str) -> str:
        """Last reported role of an instance; "" where it has no load."""
        load = self.loads.get(instance_id)
        return load.role if load is not None else ""

    async def wait_for_reports(self) -> None:
        """Returns when there are instances, and every one has reported its load."""
        while not len(self._slot_of) or not all(info.instance_id in self.loads for info in self):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def call(self, instance_id: str, request: Request[R]) -> R:
        """Calls one instance.

        Raises:
            UnknownTargetError: There is no such instance.
            EngineDeadError: The instance died before it answered, or its engine has failed.
            TimeoutError: No answer within `CALL_TIMEOUT_S`.
            PdServeError: The instance answered with this error.
        """
        if instance_id not in self:
            raise UnknownTargetError(f"no instance {instance_id!r}; see GET /cluster")
        return await self.calls.call(instance_id, request)

    async def call_all(self, request: Request[R]) -> dict[str, R]:
        """Calls every instance. Those that have left the membership meanwhile are left out.

        Raises:
            EngineDeadError: A call failed.
            TimeoutError: No answer within `CALL_TIMEOUT_S`.
        """
        names = [info.instance_id for info in self]
        calls = (self.call(name, request) for name in names)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        values: dict[str, R] = {}
        for name, answer in zip(names, answers, strict=True):
            if not isinstance(answer, BaseException):
                values[name] = answer
            elif name not in self:
                continue
            elif isinstance(answer, PdServeError) and not isinstance(answer, EngineDeadError):
                raise EngineDeadError(str(answer)) from answer
            else:
                raise answer
        return values
