"""A manager, its launcher and the processes around it in the hands of a test, in virtual time."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from pd_serve.comm.membership import ApiServerInfo, InstanceInfo, Join, Membership
from pd_serve.comm.messages import LoadReport, SchedulerReport, SetDraining, StartInstance, StopInstance
from pd_serve.comm.requests import AnyRequest, Call
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import HEARTBEAT_S
from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import EngineDeadError
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig
from router.load import InstanceLoad
from router.policies import policy_set
from router.scaling import PoolBounds
from tests.members import instance_info
from tests.recording_wire import RecordingWire

M = TypeVar("M")

#: Time that an instance takes to start.
START_S = 15.0


class FakeLauncher:
    """Starts instances, in `START_S` if not told otherwise.

    Attributes:
        fails: Raised by every start; None: starts succeed.
        start_s: Time that an instance takes to start, by id.
        waits: Instances that wait for resources.
        found: What the next manager finds, in `find_s`.
        keepers: Instances whose processes were there when notes were last given to all.
        scheduler_fails: Raised by the next starts of a scheduler.
    """

    def __init__(self) -> None:
        self.on_lost: Any = None
        self.fails: Exception | None = None
        self.start_s: dict[str, float] = {}
        self.waits: set[str] = set()
        self.stopped: list[str] = []
        self.leaves_starts = False
        self.notes: ManagerNotes | None = None
        self.keepers: set[str] = set()
        self.launched: set[str] = set()
        self.found: list[InstanceInfo] = []
        self.find_s = 0.0
        self.scheduler_starts = 0
        self.scheduler_stops = 0
        self.scheduler_start_s = 0.0
        self.scheduler_fails: Exception | None = None
        self.scheduler_dead = asyncio.Event()

    async def launch(self, name: str, placement: Placement) -> None:
        self.launched.add(name)

    def waits_for(self, name: str) -> str:
        return "waiting for resources: 1 GPU" if name in self.waits else ""

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        try:
            await asyncio.sleep(self.start_s.get(config.instance_id, START_S))
            while config.instance_id in self.waits:  # noqa: ASYNC110
                await asyncio.sleep(1)
        except asyncio.CancelledError:
            self.stopped += [] if self.leaves_starts else [config.instance_id]
            raise
        if self.fails is not None:
            raise self.fails
        return instance_info(config.instance_id)

    def leave_starts(self) -> None:
        self.leaves_starts = True

    async def stop_instance(self, name: str) -> None:
        self.stopped.append(name)

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        found = self.found, self.notes
        await asyncio.sleep(self.find_s)
        return found

    async def keep_notes(self, notes: ManagerNotes) -> int:
        self.keepers = set(self.launched)
        if self.notes is None or notes.age > self.notes.age:
            self.notes = notes
        return self.notes.term

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        if self.scheduler_fails is not None:
            raise self.scheduler_fails
        await asyncio.sleep(self.scheduler_start_s)
        self.scheduler_starts += 1
        self.scheduler_dead.clear()
        return f"tcp://scheduler-{self.scheduler_starts}", self.scheduler_starts

    async def stop_scheduler(self) -> None:
        self.scheduler_stops += 1
        self.scheduler_dead.set()

    async def scheduler_ended(self) -> None:
        await self.scheduler_dead.wait()


class Notices:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class World:
    """One prefill and two decode instances, and one API server.

    Instances report every half a second, drain when they are told so, and hold no requests.

    Attributes:
        busy: Instances that the API server has requests on.
        held: Draining and role of instances that the test reports for itself.
        silent: Instances that report nothing.
        scheduler_hangs: The scheduler reports nothing.
        known_term: Term of the latest membership that the API servers know; 0: the manager's.
        deaf: Instances that no order reaches.
        hanging: Instances that report that their engine hangs.
        fewest: The smallest number of instances so far.
    """

    def __init__(
        self,
        autoscale: Mapping[str, PoolBounds] | None = None,
        *,
        replaces: bool = True,
        launcher: FakeLauncher | None = None,
    ) -> None:
        self.wire = RecordingWire("manager")
        self.launcher = launcher or FakeLauncher()
        self.notices = Notices()
        self.busy: set[str] = set()
        self.silent: set[str] = set()
        self.hanging: set[str] = set()
        self.joined: list[str] = ["api"]
        self.scheduler_hangs = False
        self.known_term = 0
        self.deaf: set[str] = set()
        self.fewest = 3
        self._draining: dict[str, bool] = {}
        self._drained_by_operator: dict[str, bool] = {}
        self._roles: dict[str, str] = {}
        self._obeyed = self._calls = 0
        config = ManagerConfig(
            model="tiny",
            instances={"prefill": 1, "decode": 2, "neutral": 0},
            autoscale=dict(autoscale or {}),
            max_instances=5,
            policies=policy_set("llumnix"),
            engine_args={role: {} for role in ("prefill", "decode", "neutral")},
            placements={role: Placement() for role in ("prefill", "decode", "neutral")},
            host="127.0.0.1",
            keys=CurveKeys(b"", b""),
            replaces=replaces,
        )
        self.manager = Manager(config, self.wire, self.launcher, self.notices)
        self._peers = asyncio.create_task(self._play_peers())

    async def close(self) -> None:
        self._peers.cancel()
        await self.manager.close()

    async def _play_peers(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(0.1)
            self.play_peers()
            if turn % 10 == 9 and not self.scheduler_hangs:
                self.wire.hear("scheduler", SchedulerReport([]))

    def play_peers(self) -> None:
        for peer, message, _ in self.wire.sent[self._obeyed :]:
            if isinstance(message, SetDraining) and peer not in self.deaf:
                self._draining[peer] = self._drained_by_operator[peer] = message.draining
        self._obeyed = len(self.wire.sent)
        for name in self.names:
            if name not in self.silent:
                self.report(name, hangs=name in self.hanging)
        unused = [name for name in self.members.leaving if name not in self.busy]
        for api_server in self.joined:
            self.join(api_server, *unused)
        self.fewest = min(self.fewest, len(self.names))

    # ---- processes

    def join(self, api_server: str, *unused: str) -> None:
        address = f"tcp://{api_server}"
        info = ApiServerInfo(address, f"{address}/tokens")
        self.wire.hear(api_server, Join(info, list(unused), self.known_term or self.members.term))

    def report(self, name: str, **load: Any) -> None:
        load |= {"draining": self._draining.get(name, False)}
        load |= {"drained_by_operator": self._drained_by_operator.get(name, False)}
        role = self._roles.get(name, name.split("-")[0])
        self.wire.hear(name, LoadReport(InstanceLoad(name, role, **load), []))

    def change_role(self, name: str, role: str) -> None:
        self._roles[name] = role

    def drain_by_scheduler(self, name: str, draining: bool = True) -> None:
        self._draining[name] = draining or self._drained_by_operator.get(name, False)
        self.report(name)

    def want_one(self, role: str = "decode", times: int = 1) -> None:
        for _ in range(times):
            self.wire.hear("scheduler", StartInstance(role, "it is too full"))

    def supersede(self) -> None:
        """Another manager has given the instances notes of a later term."""
        assert self.launcher.notes is not None
        self.launcher.notes = replace(self.launcher.notes, term=self.launcher.notes.term + 1)

    def want_stopped(self, name: str) -> None:
        self.wire.hear("scheduler", StopInstance(name, "drained and empty"))

    async def call(self, request: AnyRequest, caller: str = "api") -> Any:
        """What the manager answers. Raises its error."""
        self._calls += 1
        self.wire.hear(caller, Call(f"call-{self._calls}", request))
        answers = len(self.sent(Answer, caller))
        while len(self.sent(Answer, caller)) == answers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        answer = self.sent(Answer, caller)[-1]
        if answer.error is not None:
            raise answer.raised()
        return answer.result

    # ---- what can be seen

    def sent(self, kind: type[M], to: str | None = None) -> list[M]:
        return self.wire.sent_to(kind, to)

    @property
    def names(self) -> list[str]:
        return sorted(self.manager.register.infos)

    @property
    def members(self) -> Membership:
        """As announced now."""
        return self.manager._membership()

    @property
    def decisions(self) -> list[str]:
        return [decision.what for decision in self.manager.state().decisions]


@asynccontextmanager
async def a_world(
    autoscale: Mapping[str, PoolBounds] | None = None, *, replaces: bool = True
) -> AsyncIterator[World]:
    """Its instances have started."""
    world = World(autoscale, replaces=replaces)
    try:
        await world.manager.start()
        await asyncio.sleep(2 * HEARTBEAT_S)
        yield world
    finally:
        await world.close()


DEAD = EngineDeadError("no memory is left")
