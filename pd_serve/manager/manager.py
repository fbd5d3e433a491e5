"""The manager of the instances and the scheduler: starts, watches, replaces, scales, drains, restarts them.

No request passes through it. API servers and instances continue while it is absent, and the next manager
finds the instances and takes over.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.leases import LeaseClock
from pd_serve.comm.membership import SCHEDULER, InstanceInfo, Join, Membership
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import LoadReport, SchedulerReport, StartInstance, StopInstance, ToManager
from pd_serve.comm.requests import Call
from pd_serve.comm.rpc import Answer, RpcClient
from pd_serve.comm.timing import HEARTBEAT_S, INSTANCE_LEASE_S, TERM_CHECK_S
from pd_serve.errors import EngineDeadError
from pd_serve.instance.engine_factory import no_moves
from pd_serve.manager.announcer import Announcer
from pd_serve.manager.decision_log import DecisionLog
from pd_serve.manager.launcher import TERM_STEP, Launcher, ManagerNotes
from pd_serve.manager.lora_adapters import LoraAdapters
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.manager.notices import OperatorNotices
from pd_serve.manager.operations import Operations
from pd_serve.manager.pool_sizes import PoolSizes
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.rolling_restart import RollingRestart
from pd_serve.manager.scheduler_keeper import SchedulerKeeper
from pd_serve.manager.starter import Starter
from pd_serve.manager.stopper import Stopper
from pd_serve.scheduler.scheduler_process import SchedulerConfig


class Manager:
    """The manager of a cluster. Runs on one event loop until `close`.

    `close` does not end the processes; the launcher does.

    Attributes:
        address: Address at which it receives messages.
        announcer: Has the API servers that have joined.
        is_superseded: Another manager has taken over, and this one has ended.
    """

    def __init__(
        self, config: ManagerConfig, wire: MessageWire, launcher: Launcher, notices: OperatorNotices
    ) -> None:
        self._config = config
        self._wire = wire
        self._launcher = launcher
        self._notices = notices
        self._tasks = BackgroundTasks(wire.failures.task_failed)
        # Later than that of any before, unless the clock was set back; see `_exceed`.
        self._started_at_us = time.time_ns() // 1_000
        self._notes = ManagerNotes(term=self._started_at_us)
        self._noted_by: list[str] = []
        self.is_superseded = self._is_open = self._closed = False
        self._closing: asyncio.Future[None] | None = None
        self._clock = LeaseClock()
        self.register = InstanceRegister(self._clock)
        self.log = DecisionLog(self._changed)
        self._calls = RpcClient(wire, Call)
        self.announcer = Announcer(
            wire, self._clock, self._membership, self.state, self._changed, self._calls.peer_lost
        )
        self._starter = Starter(
            self.register, self.log, self._start, launcher.waits_for, self._changed, config.instances
        )
        self._stopper = Stopper(
            self.register, self.log, wire, self._stop, self.announcer.is_used, self._changed
        )
        self._sizes = PoolSizes(
            self.register,
            self._starter,
            self._stopper,
            config.instances,
            config.autoscale,
            lambda: self._restart.spare,
            replaces=config.replaces,
        )
        self._restart = RollingRestart(self.register, self._starter, self._stopper, self.log, self._changed)
        scheduler = SchedulerConfig(config.policies, config.autoscale, config.host, config.keys)
        self._scheduler = SchedulerKeeper(
            launcher, scheduler, self._clock, self.keep_notes, self._on_scheduler_started, notices.warn
        )
        self._adapters = LoraAdapters(self.register, self._calls, self._keep_changes)
        self._operations = Operations(
            wire,
            self.register,
            self._stopper,
            self._sizes,
            self._restart,
            self._adapters,
            self.announcer,
            self._calls,
            self._keep_changes,
        )
        launcher.on_lost = self._on_lost
        self.address = wire.listen(ToManager, self._on_message, gathers=True)

    async def start(self) -> None:
        """Starts the first instances. Raises: PdServeError: one does not start."""
        self.announcer.open()  # an instance that is ready long before the others has to hear of its manager
        await self._starter.start_first(self._config.first_names())
        self._open()

    async def take_over(self) -> bool:
        """Takes over the instances of the last manager. Returns False if there are none."""
        infos, notes = await self._launcher.find()
        if not infos:
            return False
        if notes is not None:
            self._notes = replace(notes, term=self._term_after(notes.term))
            self._sizes.wanted = dict(notes.wanted)
            self._starter.next_numbers = dict(notes.next_numbers)
            self._sizes.stopped = dict(notes.stopped)
            self._adapters.take_over(notes)
        for info in infos:
            self._wire.connect(info.instance_id, info.address)
            self.register.add(info, self._notes.roles.get(info.instance_id, ""))
            self._starter.exclude(info.instance_id)
        if notes is not None:  # some of their instances have died since
            self._stopper.drained_by_operator = set(notes.drained_by_operator) & self.register.infos.keys()
        for instance_id in notes.stopping if notes is not None else []:
            self._stopper.stop_drained(instance_id, "drained before the restart of the manager")
        if notes is not None and notes.restart is not None:
            self._restart.resume(notes.restart)
        for name, api_server in (notes or self._notes).api_servers.items():
            self.announcer.on_join(name, Join(api_server, unused=[]))
        if not await self.keep_notes():  # the next term, before any process sees it
            return True
        self._sizes.keep("missing after the restart of the manager")
        self._sizes.trim("its pool is too large after the restart of the manager")
        self._notices.step(f"took over {', '.join(info.instance_id for info in infos)}")
        self.announcer.open()
        self._open()
        return True

    def _open(self) -> None:
        self._is_open = True
        self._scheduler.open()
        self._tasks.start(self._watch_instances())
        self._tasks.start(self._watch_term())
        self._changed()

    async def close(self) -> None:
        self._closed = True
        await self._tasks.cancel()
        starting = (self._scheduler, self._restart, self._starter)
        for part in (*starting, self._stopper, self.announcer, self._operations):
            await part.close()
        await self._wire.close()

    # ---- processes

    async def _start(self, name: str, role: str) -> InstanceInfo:
        config = self._config
        config.check_memory(name, role)
        await self._launcher.launch(name, config.placements[role])
        if self._is_open:  # it keeps the notes before it is ready: all others may have died
            self._tasks.start(self.keep_notes())
        info = await self._launcher.start(config.instance(name, role))
        self._wire.connect(name, info.address)
        self._notices.step(f"{name} is ready (pid {info.pid})")
        if info.engine.no_migration is not None:
            self._notices.warn(f"{name}: {no_moves(info.engine.no_migration, role)}")
        return info

    async def _stop(self, instance_id: str) -> None:
        if await self.keep_notes():  # otherwise another manager uses it
            await self._launcher.stop_instance(instance_id)
        self._wire.disconnect(instance_id)
        self._sizes.stopped.pop(instance_id, None)

    def _on_lost(self, instance_id: str) -> None:
        if not self._closed:
            self._notices.warn(f"{instance_id} has died; its requests are recomputed elsewhere")
            self._lose(instance_id)

    def _lose(self, instance_id: str) -> None:
        if instance_id not in self.register:
            return
        role, age_s = self.register.role_of(instance_id), self.register.age_s(instance_id)
        self.register.remove(instance_id)
        self._calls.peer_lost(instance_id)
        self._wire.disconnect(instance_id)
        self._stopper.forget(instance_id)
        self.log.count("lost", role)
        self._starter.died(role, age_s)
        self._sizes.on_death(instance_id)
        self._changed()

    async def _watch_instances(self) -> None:
        while not self._closed:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._end_failed()
                if not self._closed:
                    self._sizes.keep("its pool is too small")
            except Exception as error:  # whatever it is: the instances have to be watched
                self._wire.failures.record("watching the instances", error)

    async def _end_failed(self) -> None:
        """Ends instances whose lease has expired or whose engine hangs: they must not continue later."""
        silence = f"has reported nothing for {INSTANCE_LEASE_S:.0f} s"
        failed = dict.fromkeys(self.register.silent(), silence)
        failed |= dict.fromkeys(self.register.hanging(), "hangs in a step of its engine")
        if failed and not await self.keep_notes():
            return
        for instance_id, why in failed.items():
            self._notices.warn(f"{instance_id} {why} and is ended; its requests are recomputed elsewhere")
            self._lose(instance_id)
            self._tasks.start(self._launcher.stop_instance(instance_id))

    async def _watch_term(self) -> None:
        """Notices another manager, which may have taken over at the same time, also if nothing changes."""
        while True:
            await asyncio.sleep(TERM_CHECK_S)
            await self.keep_notes()

    def _on_scheduler_started(self, address: str) -> None:
        self._wire.connect(SCHEDULER, address)
        self._changed()

    # ---- membership and notes

    def _changed(self) -> None:
        """Announces the membership, and gives changed notes to the instances."""
        if self._closed:
            return
        self.announcer.announce_soon()
        kept_by = list(self.register.infos)
        notes = replace(
            self._notes,
            wanted=dict(self._sizes.wanted),
            next_numbers=dict(self._starter.next_numbers),
            drained_by_operator=sorted(self._stopper.drained_by_operator),
            stopping=self._stopper.stopping,
            stopped=dict(self._sizes.stopped),
            roles=self.register.roles(),
            restart=self._restart.notes,
            api_servers=self.announcer.api_servers,
            **self._adapters.notes,
        )
        if (notes, kept_by) != (self._notes, self._noted_by):
            self._notes, self._noted_by = replace(notes, version=notes.version + 1), kept_by
            self._tasks.start(self.keep_notes())

    async def _keep_changes(self) -> None:
        """Returns when the instances have noted the present state. Raises: EngineDeadError: superseded."""
        self._changed()
        if not await self.keep_notes():
            raise EngineDeadError("another manager has taken over")

    async def keep_notes(self) -> bool:
        """Gives the notes to the instances. Returns False, and ends, if another manager has taken over."""
        term = await self._launcher.keep_notes(self._notes)
        if term > self._notes.term and not self._closed:
            self._notices.warn("another manager has taken over; this one ends")
            self._launcher.leave_starts()
            self._closed = self.is_superseded = True
            self._closing = asyncio.ensure_future(self.close())
        return not self._closed

    async def _exceed(self, term: int) -> None:
        """An API server has joined that ignores this manager: it knows a manager of a later term.

        If the instances do not know that one, it is gone with all its own, and its clock was ahead.
        """
        if (kept := await self._launcher.keep_notes(self._notes)) == self._notes.term:
            self._notes = replace(self._notes, term=max(kept, self._term_after(term)))
        if await self.keep_notes():
            self._changed()

    def _term_after(self, term: int) -> int:
        """A later term. Managers that take over at the same time have different ones, by their starts."""
        return term + 1 + self._started_at_us % TERM_STEP

    def _membership(self) -> Membership:
        return Membership(
            term=self._notes.term,
            address=self.address,
            instances=self.register.in_order(),
            leaving=sorted(self._stopper.leaving),
            starting=dict(self._starter.num_starting),
            scheduler=self._scheduler.address,
            api_servers=self.announcer.api_servers,
            lora_adapters=list(self._adapters),
        )

    def state(self) -> ClusterState:
        """The state for `GET /cluster` and `/metrics`, apart from the instances."""
        return ClusterState(
            starting=self._starter.rows(),
            scheduler=self._scheduler.state,
            scaled=self.log.scaled(),
            decisions=self.log.latest(),
            restart=self._restart.state,
            scheduler_stats=self._scheduler.stats,
            problems=self._wire.failures.problems(),
            wanted=self._sizes.least,
            message_errors=dict(self._wire.failures.by_kind),
            replaces=self._config.replaces,
        )

    # ---- messages

    def _on_message(self, sender: str, message: Any, payload: Sequence[bytes]) -> None:
        if not self._is_open:
            return  # it is for an earlier process at this address
        # The sender of a `Join` of another term has not heard this manager. Neither may the instances have.
        if not (isinstance(message, Join) and message.term != self._notes.term):
            self._clock.on_message()
        match message:
            case Join():
                self.announcer.on_join(sender, message)
                if message.term > self._notes.term:
                    self._tasks.start(self._exceed(message.term))
            case LoadReport(load=load):
                self.register.on_report(load)
                self._stopper.on_report(load)
            case SchedulerReport():
                self._on_scheduler_report(message)
            case StartInstance(role=role, reason=reason):
                self._start_wanted(role, reason)
            case StopInstance(instance_id=instance_id, reason=reason):
                self._stopper.stop_empty(instance_id, reason)
            case Call(call_id=call_id, request=request):
                self._operations.on_call(sender, call_id, request)
            case Answer():
                self._calls.on_answer(sender, message)

    def _on_scheduler_report(self, report: SchedulerReport) -> None:
        self._scheduler.on_report(report.stats)
        for decision in report.decisions:
            # The scheduler's decisions about an instance that the operator drains have no effect.
            if decision.instance_id not in self._stopper.drained_by_operator:
                self.log.add(f"{decision.instance_id} {decision.action}: {decision.reason}")

    def _start_wanted(self, role: str, reason: str) -> None:
        """Starts an instance for the scheduler, if one may start now. The scheduler repeats its request."""
        number = len(self.register) + len(self._starter.not_ready)
        if number < self._config.max_instances and not self._starter.is_backing_off(role):
            self._starter.start_once(role, reason)
