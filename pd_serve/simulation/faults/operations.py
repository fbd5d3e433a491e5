"""Operations by hand in the middle of faults, and the pool sizes that follow from them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.frontend.frontend import Frontend
from pd_serve.simulation.faults.clients import Clients
from pd_serve.simulation.faults.cluster import FaultyCluster
from pd_serve.simulation.faults.schedule import FaultKind, ScheduledFault

#: An operation has to be answered within this time.
ANSWER_BOUND_S = 130.0

#: Operations that change the size of a pool.
RESIZING = (FaultKind.SCALE, FaultKind.DRAIN_STOP, FaultKind.UNDO)


class OperatorCalls:
    """Calls the API of an operator, and checks that each call is answered.

    Args:
        report: Takes a finding.
        note: Takes a line of the trace.

    Attributes:
        sizes: Possible sizes of each pool: several if the answer to an order was lost, or came after the next
            order.
        drained: Instances that an operator has drained.
        has_changed_roles: An instance that dies under another role is replaced in the pool of that role.
    """

    def __init__(
        self,
        cluster: FaultyCluster,
        clients: Clients,
        report: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self.sizes = {role: {count} for role, count in cluster.shape.instances.items()}
        self.drained: list[str] = []
        self.has_changed_roles = bool(cluster.shape.settings.get("roles"))
        self._stopped: dict[str, str] = {}
        self._cluster = cluster
        self._clients = clients
        self._report = report
        self._note = note
        self._reused: set[str] = set()  # those of `_stopped` that a larger pool may use again
        self._shrunk: set[str] = set()  # roles of pools whose instances may be stopped already
        self._resizing: set[int] = set()  # operations in progress
        self._overlapping: set[int] = set()
        self._open: dict[int, str] = {}
        self._number = 0

    @property
    def unanswered(self) -> list[str]:
        return sorted(self._open.values())

    def begin(self, fault: ScheduledFault, name: str) -> None:
        """Begins an operation at some living API server."""
        servers = [s for s in self._cluster.api_servers if s.process.is_running]
        if not servers:
            return
        server = servers[int(fault.at_s * 1000) % len(servers)]
        if fault.kind is FaultKind.UNDO and self.drained:
            name = self.drained[-1]
        work = self._operation(fault, name, server.frontend)
        if work is not None:
            self._number += 1
            self._open[self._number] = f"{fault.kind} {name or fault.target}"
            if fault.kind in RESIZING:
                self._resizing.add(self._number)
                self._overlapping |= self._resizing if len(self._resizing) > 1 else set()
            size = max(1, min(self.sizes.get(fault.target, {0})) + int(fault.value))
            server.process.start(self._call(self._number, fault, name, size, work))
            if self._cluster.shape.one_process is False:
                loop = self._cluster.loop
                loop.outside_at(
                    loop.now + ANSWER_BOUND_S, self._forget_of_dead, self._number, server, fault, name, size
                )

    def _forget_of_dead(self, number: int, server: Any, fault: ScheduledFault, name: str, size: int) -> None:
        """The API server has died before it had the answer; the manager may have begun the operation."""
        if number in self._open and not server.process.is_alive:
            self._end(number)
            self._apply(fault, name, size, is_sure=False)

    def _end(self, number: int) -> None:
        self._open.pop(number, None)
        self._resizing.discard(number)

    def _operation(
        self, fault: ScheduledFault, name: str, frontend: Frontend
    ) -> Coroutine[Any, Any, Any] | None:
        match fault.kind:
            case FaultKind.DRAIN:
                return frontend.drain(name)
            case FaultKind.DRAIN_STOP:
                return frontend.drain(name, stop=True)
            case FaultKind.UNDO:
                return frontend.drain(name, draining=False) if name else None
            case FaultKind.SCALE:
                size = min(self.sizes.get(fault.target, {0})) + int(fault.value)
                return frontend.scale({fault.target: max(1, size)})
            case FaultKind.RESTART:
                return frontend.restart()
            case _:
                stream = self._clients.stream_of(int(fault.value) % len(self._clients.requests))
                return frontend.migrate(stream.request_id, name) if stream is not None else None

    async def _call(
        self, number: int, fault: ScheduledFault, name: str, size: int, work: Coroutine[Any, Any, Any]
    ) -> None:
        what = self._open[number]
        try:
            async with asyncio.timeout(ANSWER_BOUND_S) as bound:
                await work
        except EngineDeadError as error:
            self._note(f"{what}: {error}")
            self._apply(fault, name, size, is_sure=False)
        except PdServeError as error:
            self._note(f"{what}: {error}")
        except Exception as error:
            late = f"was not answered within {ANSWER_BOUND_S:.0f} s"
            self._report(f"{what} {late if bound.expired() else f'failed: {error!r}'}")
        else:
            self._note(f"{what}: done")
            self._apply(fault, name, size, is_sure=number not in self._overlapping)
        finally:
            self._end(number)

    def _apply(self, fault: ScheduledFault, name: str, size: int, *, is_sure: bool) -> None:
        """Changes the expected sizes as the operation does, or may have done."""
        role = name.rpartition("-")[0]
        match fault.kind:
            case FaultKind.SCALE:
                known = self.sizes.get(fault.target, {0})
                self._shrunk |= {fault.target} if fault.value < 0 else set()
                self.sizes[fault.target] = {size} if is_sure else known | {size}
                self._reused |= {stopped for stopped, of in self._stopped.items() if of == fault.target}
            case FaultKind.DRAIN_STOP if name not in self._stopped or name in self._reused:
                self._stopped[name] = role
                smaller = {known - 1 for known in self.sizes[role]}
                is_sure = is_sure and name not in self._reused and role not in self._shrunk
                self.sizes[role] = smaller if is_sure else smaller | self.sizes[role]
            case FaultKind.UNDO if name in self._stopped or role in self._shrunk:
                larger = {known + 1 for known in self.sizes[role]}
                survivors = self._cluster.platform.starts.survivors  # the manager takes them for ended
                is_sure = self._stopped.pop(name, "") == role and is_sure
                is_sure = is_sure and name not in self._reused and name not in survivors
                self.sizes[role] = larger if is_sure else larger | self.sizes[role]
        if fault.kind in (FaultKind.DRAIN, FaultKind.DRAIN_STOP):
            self.drained.append(name)
        elif fault.kind is FaultKind.UNDO and name in self.drained:
            self.drained.remove(name)
