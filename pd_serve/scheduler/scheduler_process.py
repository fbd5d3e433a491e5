"""The global scheduler as a process: `router.scheduler` between reports of instances and commands to them.

It sees instances, never requests, and keeps nothing that the next one would miss: membership comes with
every Hello of an API server, loads with the instances' reports. It may die at any time; until the next one
has heard them, requests stay where they are.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import (
    Hello,
    LoadReport,
    MoveOut,
    PeerLost,
    SchedulerReport,
    SchedulerStats,
    SetDraining,
    SetRole,
    StartInstance,
    StopInstance,
    Subscribe,
    ToScheduler,
)
from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import EngineDeadError
from pd_serve.observe.process_stats import process_stats
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import Demand
from router.scaling import PoolBounds
from router.scheduler import Scheduler
from router.settings import PolicySet

logger = logging.getLogger(__name__)

#: By this name it is known on the wire. The next one has the same, and so takes the last one's place.
SCHEDULER = "scheduler"

HEARTBEAT_S = 1.0

#: A new scheduler hears all instances before it decides, but waits no longer for the first ones than this.
FIRST_LOOK_S = 2.0

#: Without any for so long it ends: whoever has started it is gone, too.
ORPHAN_S = 120.0

#: An API server that has said nothing for so long is gone; what only it knew is no member any more.
SERVER_LEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What a scheduler is started with. Plain values: it travels through Ray.

    Attributes:
        autoscale: Bounds by role; a role without them does not scale.
    """

    policies: PolicySet
    autoscale: dict[str, PoolBounds]
    host: str
    keys: CurveKeys


class MessageWire(Protocol):
    """What is used of `pd_serve.comm.wire.Wire`; a simulated network has the same."""

    def listen(self, on_message: Callable[[list[bytes]], None]) -> str: ...
    def connect(self, peer: str, address: str) -> None: ...
    def disconnect(self, peer: str) -> None: ...
    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool: ...
    def decoder(self, kind: Any) -> Callable[[bytes], Any]: ...


@dataclass(slots=True)
class Server:
    """An API server, as its last Hello shows it.

    Attributes:
        members: Live instances' addresses, by id.
        starting: Instances that it is starting, by role.
        waiting: Its requests that no instance has yet.
        owns: Whether it starts and stops instances.
        asked: Instances asked for and not in `starting` yet, by role.
    """

    heard_at: float
    members: dict[str, str]
    starting: Mapping[str, int]
    waiting: Demand
    owns: bool = True
    asked: Counter[str] = field(default_factory=Counter)


class SchedulerProcess:
    """Implements `router.scheduler.SchedulerActions` by messages. Lives on one event loop, until `close`.

    Args:
        policies: From `router.policies.policy_set`.
        autoscale: Bounds by role, for the pools whose size may change.
        on_failure: Told when the loop has failed. Nothing is decided any more: best to end, and be
            started again.
    """

    def __init__(
        self,
        name: str,
        wire: MessageWire,
        policies: PolicySet,
        *,
        autoscale: Mapping[str, PoolBounds] | None = None,
        seed: int = 0,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.name = name
        self.address = wire.listen(self._on_frames)
        self.scheduler = Scheduler(policies, self, autoscale=autoscale, rng=random.Random(seed))
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks(on_failure)
        self._decode = wire.decoder(ToScheduler)
        self._servers: dict[str, Server] = {}
        self._members: dict[str, str] = {}
        self._unheard: set[str] = set()
        self._all_heard = asyncio.Event()
        self._moves = Counter(dict.fromkeys(("balance", "defragment", "drain"), 0))
        self._scaling = Counter(dict.fromkeys(("start", "stop", "drain", "use_again", "set_role"), 0))
        self._greeted_at = self._loop.time()
        self._tasks.start(self._decide())
        self._tasks.start(self._heartbeat())

    async def close(self) -> None:
        await self._tasks.cancel()

    @property
    def members(self) -> Mapping[str, str]:
        """Addresses of all instances, by id."""
        return self._members

    @property
    def starting(self) -> Counter[str]:
        """Instances that are on their way, by role."""
        return sum((server.asked + Counter(server.starting) for server in self._servers.values()), Counter())

    @property
    def waiting(self) -> Demand:
        """Requests that no instance has yet, at all API servers."""
        demands = [server.waiting for server in self._servers.values()]
        return Demand(sum(demand.requests for demand in demands), sum(demand.tokens for demand in demands))

    # ---- messages

    def _on_frames(self, frames: Sequence[bytes]) -> None:
        sender, message = frames[0].decode(), self._decode(frames[1])
        match message:
            case LoadReport(load=load):
                if sender in self._members:
                    self.scheduler.report(load)
                    self._heard(sender)
            case Hello():
                news = sender not in self._servers
                self._greeted_at = self._loop.time()
                self._wire.connect(sender, message.address)
                self._servers[sender] = Server(
                    self._loop.time(),
                    dict(message.peers),
                    message.starting,
                    message.waiting,
                    message.owns,
                )
                if news:
                    self._tell([])
                self._update_members()
            case PeerLost(instance_id=instance_id):
                for server in self._servers.values():
                    server.members.pop(instance_id, None)
                self._update_members()

    def _update_members(self) -> None:
        """An instance is a member as long as any API server knows it."""
        members = {name: address for s in self._servers.values() for name, address in s.members.items()}
        for gone in [name for name in self._members if name not in members]:
            self._wire.disconnect(gone)
            self.scheduler.remove(gone)
            self._heard(gone)
        news = {name: address for name, address in members.items() if self._members.get(name) != address}
        self._members = members
        self._unheard.update(news)
        for name, address in news.items():
            self._wire.connect(name, address)
            self._wire.send(name, Subscribe(self.address))

    def _heard(self, instance_id: str) -> None:
        self._unheard.discard(instance_id)
        if not self._unheard:
            self._all_heard.set()

    async def _decide(self) -> None:
        """Runs the scheduler. On half of the reports it would find every pool too small."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._all_heard.wait()
        await self.scheduler.run()

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for name in self._members:
                self._wire.send(name, Subscribe(self.address))
            self._tell([], self.stats())
            if self._loop.time() - self._greeted_at > ORPHAN_S:
                raise EngineDeadError(f"nobody has greeted {self.name} for {ORPHAN_S:.0f} s")
            oldest = self._loop.time() - SERVER_LEASE_S
            for name in [name for name, server in self._servers.items() if server.heard_at < oldest]:
                logger.warning("API server %s is gone", name)
                del self._servers[name]
                self._wire.disconnect(name)
                self._update_members()

    # ---- SchedulerActions

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None:
        self._moves[reason] += 1
        self._wire.send(source, MoveOut(destination, reason, selection))

    def set_role(self, instance_id: str, role: str, reason: str) -> None:
        self._scaling["set_role"] += 1
        self._wire.send(instance_id, SetRole(role))
        self._tell([f"{instance_id} becomes {role}: {reason}"])

    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None:
        self._scaling["drain" if draining else "use_again"] += 1
        self._wire.send(instance_id, SetDraining(draining))
        self._tell([f"{instance_id} is {'drained' if draining else 'used again'}: {reason}"])

    def start(self, role: str, reason: str) -> None:
        """One is asked, the first by name, so that not each of several starts one."""
        self._scaling["start"] += 1
        for name in sorted(name for name, server in self._servers.items() if server.owns)[:1]:
            self._servers[name].asked[role] += 1
            self._wire.send(name, StartInstance(role, reason))

    def stop(self, instance_id: str, reason: str) -> None:
        self._scaling["stop"] += 1
        for name in self._servers:
            self._wire.send(name, StopInstance(instance_id, reason))

    def stats(self) -> SchedulerStats:
        """For metrics: since this scheduler has begun."""
        heard = len(self._members) - len(self._unheard)
        return SchedulerStats(process_stats(), heard, dict(self._moves), dict(self._scaling))

    def _tell(self, decided: list[str], stats: SchedulerStats | None = None) -> None:
        for name in self._servers:
            self._wire.send(name, SchedulerReport(decided, stats))
