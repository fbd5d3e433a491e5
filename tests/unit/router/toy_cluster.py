"""Instances that hold requests of constant size, under the real scheduler and the real selection rules."""

import random
from dataclasses import dataclass, field

from msgspec.structs import replace

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import NO_DEMAND, Demand
from router.rescheduling.selection import RequestSelector
from router.scheduler import Scheduler
from router.settings import PolicySet


@dataclass(frozen=True)
class Request:
    name: str
    blocks: int
    priority: int = 0
    arrived_at: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.blocks * 16


@dataclass
class Instance:
    total_blocks: int
    requests: list[Request]
    head_of_line_blocks: int = 0
    draining: bool = False
    role: str = "neutral"
    moves_decided: int = 0

    def load(self, name: str) -> InstanceLoad:
        return InstanceLoad(
            name,
            self.role,
            total_blocks=self.total_blocks,
            free_blocks=self.total_blocks - sum(request.blocks for request in self.requests),
            running=len(self.requests),
            waiting=int(self.head_of_line_blocks > 0),
            head_of_line_blocks=self.head_of_line_blocks,
            waiting_blocks=self.head_of_line_blocks,
            draining=self.draining,
            high_priority=sum(request.priority < 0 for request in self.requests),
            moves_decided=self.moves_decided,
        )


@dataclass
class ToyCluster:
    """Implements `SchedulerActions`. Every migration has succeeded by the next round.

    Attributes:
        moves: (request, source, destination, reason) of all rounds.
    """

    instances: dict[str, Instance]
    moves: list[tuple[Request, str, str, str]] = field(default_factory=list)
    starting: dict[str, int] = field(default_factory=dict)
    waiting: Demand = NO_DEMAND
    _ordered: list[tuple[str, InstanceLoad, str, PolicyChoice]] = field(default_factory=list)

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None:
        self._ordered.append((source, destination, reason, selection))

    def set_role(self, instance_id: str, role: str, reason: str) -> None:
        self.instances[instance_id].role = role

    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None:
        self.instances[instance_id].draining = draining

    def start(self, role: str, reason: str) -> None:
        raise AssertionError(reason)

    def stop(self, instance_id: str, reason: str) -> None:
        del self.instances[instance_id]

    def run(self, policies: PolicySet, rounds: int) -> "ToyCluster":
        clock = [0.0]
        scheduler = Scheduler(policies, self, rng=random.Random(0), clock=lambda: clock[0])
        for _ in range(rounds):
            for name, instance in self.instances.items():
                scheduler.report(instance.load(name))
            scheduler.decide(clock[0])
            self._migrate()
            clock[0] += policies.rescheduling_interval_s
        return self

    def _migrate(self) -> None:
        """All sources choose before anything has left, as in a cluster."""
        leaving: dict[str, list[Request]] = {}
        arriving: list[tuple[str, Request]] = []
        for source, destination, reason, selection in self._ordered:
            instance = self.instances[source]
            instance.moves_decided += 1
            gone = leaving.setdefault(source, [])
            load = replace(instance.load(source), migrating_out=len(gone))
            stay = [request for request in instance.requests if request not in gone]
            chosen = RequestSelector().select(selection, stay, load, destination)
            room = self.free(destination.instance_id) - sum(
                request.blocks for name, request in arriving if name == destination.instance_id
            )
            if chosen is not None and chosen.blocks <= room:
                gone.append(chosen)
                arriving.append((destination.instance_id, chosen))
                self.moves.append((chosen, source, destination.instance_id, reason))
        self._ordered.clear()
        for source, requests in leaving.items():
            for request in requests:
                self.instances[source].requests.remove(request)
        for name, request in arriving:
            self.instances[name].requests.append(request)

    def free(self, name: str) -> int:
        return self.instances[name].load(name).free_blocks
