"""What each kind of fault does to a cluster."""

import random
from collections.abc import Callable
from typing import get_args

from migration.errors import Refusal, RefusalCode
from pd_serve.comm.messages import SetRole
from pd_serve.comm.timing import INSTANCE_LEASE_S
from pd_serve.observe.recorder import RecomputeReason
from pd_serve.simulation.faults.clients import Clients
from pd_serve.simulation.faults.cluster import FaultyCluster
from pd_serve.simulation.faults.links import FaultyLink
from pd_serve.simulation.faults.operations import OperatorCalls
from pd_serve.simulation.faults.process_loop import ThawOrder
from pd_serve.simulation.faults.schedule import FaultKind, ScheduledFault
from pd_serve.simulation.faults.targets import FaultTarget, TargetFinder

#: A silence of an instance that is shorter by this than a lease does not excuse its end.
LEASE_MARGIN_S = 4.0

#: The platform ends an API server or a manager that has not answered for this time.
HANG_NOTICED_S = 33.0

#: Ends a fault.
End = Callable[[], None]


class Effects:
    """Begins faults.

    Attributes:
        excused: Names of instances that a manager may end: they were silent for the time of a lease.
        flips: (id of the request, `num_computed_anew` then) of each flipped bit.
    """

    def __init__(
        self,
        cluster: FaultyCluster,
        clients: Clients,
        targets: TargetFinder,
        operations: OperatorCalls,
        order: ThawOrder,
        rng: random.Random,
    ) -> None:
        self.excused: set[str] = set()
        self.flips: list[tuple[str, int]] = []
        self._cluster = cluster
        self._clients = clients
        self._targets = targets
        self._operations = operations
        self._order = order
        self._rng = rng

    def begin(self, fault: ScheduledFault, names: dict[str, str]) -> tuple[str, End | None]:
        """Performs a fault. Returns what was done, and what ends it."""
        kind, platform = fault.kind, self._cluster.platform
        match kind:
            case FaultKind.DIES_EARLY:
                platform.starts.early_deaths += int(fault.value)
                platform.starts.dies_after_s = 0.2 + self._rng.random() * 5.0
                return "", None
            case FaultKind.FAILED_START:
                platform.starts.failures += int(fault.value)
                return "", None
            case FaultKind.SLOW_START:
                platform.starts.delay_s += fault.value
                return "", lambda: self._end_slow_start(fault.value)
            case FaultKind.STARVE:
                platform.starve(True)
                return "", lambda: platform.starve(False)
            case FaultKind.POISON:
                platform.poison.add(int(fault.value))
                return "", None
            case FaultKind.LOSE_STARTS:
                platform.starts.lost_starts += int(fault.value)
                return "", None
            case FaultKind.LOSE_STOPS:
                platform.starts.lost_stops += int(fault.value)
                return "", None
            case FaultKind.LOSE_NEXT:
                self._cluster.network.lost_next[fault.other] = int(fault.value)
                return "", lambda: self._end_losses(fault.other)
            case FaultKind.ABORT:
                request = names.get("request") if fault.target == "request" else ""
                self._clients.abort(int(request or fault.value))
                return request or "", None
            case FaultKind.TWIN:
                self._cluster.start_manager()
                return "", None
            case FaultKind.WALL if not fault.target:
                self._cluster.loop.jump_wall(fault.value)
                return "all", None
            case FaultKind.UNDO | FaultKind.SCALE | FaultKind.RESTART:
                self._operations.begin(fault, "")
                return "", None
        target = self._targets.find(fault.target, names)
        if target is None:
            return "nothing: no such process", None
        if kind in (FaultKind.DRAIN, FaultKind.DRAIN_STOP, FaultKind.MIGRATE):
            self._operations.begin(fault, target.name)
            return target.name, None
        return target.name, self._begin_at(fault, target, names)

    def _begin_at(self, fault: ScheduledFault, target: FaultTarget, names: dict[str, str]) -> End | None:
        match fault.kind:
            case FaultKind.KILL:
                target.kill()
            case FaultKind.FREEZE:
                self._excuse(target.name, fault.for_s)
                target.process.suspend()
                return lambda: target.process.resume(self._order)
            case FaultKind.HANG:
                self.excused.add(target.name)
                self._cluster.platform.starts.hanging.add(target.name)
                target.process.suspend()
                if target.name not in ("scheduler", *self._cluster.platform.actors):
                    loop = self._cluster.loop
                    loop.outside_at(loop.now + HANG_NOTICED_S, self._end_hanging, target)
            case FaultKind.CLOCK:
                target.process.jump(fault.value)
            case FaultKind.WALL:
                target.process.jump_wall(fault.value)
            case FaultKind.CUT | FaultKind.RESET:
                return self._cut(fault, target, names)
            case FaultKind.DELAY | FaultKind.LOSE | FaultKind.DUPLICATE:
                return self._spoil_links(fault, target)
            case FaultKind.ROLE:
                return self._change_role(target.name, fault.other)
            case _:
                return self._begin_in_engine(fault, target)
        return None

    def _begin_in_engine(self, fault: ScheduledFault, target: FaultTarget) -> End | None:
        cluster, name = self._cluster, target.name
        actor = cluster.platform.actors.get(name)
        if actor is None or actor.instance is None:
            return None
        fabric, instance = cluster.network.fabric, actor.instance
        match fault.kind:
            case FaultKind.STALL_READS:
                fabric.stall(name)
                return lambda: self._restore(name)
            case FaultKind.FAIL_READS:
                fabric.fail(name)
                return lambda: self._restore(name)
            case FaultKind.STEP:
                self._excuse(name, fault.for_s)
                actor.faults.hang_s += fault.for_s
            case FaultKind.REFUSE:
                actor.faults.refuse_next(fault.other, Refusal(RefusalCode.NO_FREE_BLOCKS, "injected"))
            case FaultKind.SLOW_CALL:
                actor.faults.delays_s[fault.other] = fault.value
                return lambda: actor.faults.delays_s.clear()
            case FaultKind.PREEMPT:
                decoding = [s.request_id for s in instance.engine.batcher.running if s.is_decoding]
                if decoding:
                    instance.engine.preempt(self._rng.choice(decoding))
            case FaultKind.FLIP:
                self._flip(name)
        return None

    # ---- single kinds

    def _excuse(self, name: str, silence_s: float) -> None:
        if silence_s > INSTANCE_LEASE_S - LEASE_MARGIN_S:
            self.excused.add(name)

    def _end_hanging(self, target: FaultTarget) -> None:
        """The platform ends a manager or an API server whose process does not answer."""
        if target.process.is_alive:
            target.kill()

    def _end_losses(self, kind: str) -> None:
        self._cluster.network.lost_next.pop(kind, None)

    def _end_slow_start(self, delay_s: float) -> None:
        self._cluster.platform.starts.delay_s -= delay_s

    def _restore(self, name: str) -> None:
        if name in self._cluster.platform.actors:
            self._cluster.network.fabric.restore(name)

    def _cut(self, fault: ScheduledFault, target: FaultTarget, names: dict[str, str]) -> End:
        """Cuts a process off from another one, or from all; in both directions if the value is 2."""
        network, name = self._cluster.network, target.name
        is_reset = fault.kind is FaultKind.RESET
        links: list[tuple[str, str]] = []

        def cut(peer: str) -> None:
            for link in [(name, peer), (peer, name)][: 2 if fault.value == 2.0 else 1]:
                links.append(link)
                network.link(*link).cuts += 1

        def cut_from_all(peer: str) -> None:
            cut(peer)
            if name == "manager" and peer not in self._cluster.platform.instances:
                self._excuse(peer, fault.for_s)  # it starts and cannot learn where to report

        def end() -> None:
            if end_of_newcomers is not None:
                end_of_newcomers()
            for link in links:
                network.heal(*link, reset=is_reset)

        end_of_newcomers: End | None = None
        if not fault.other:
            if name != "manager":
                self._excuse(name, fault.for_s)
            end_of_newcomers = self._with_each_peer(name, cut_from_all)
        elif other := self._targets.find(fault.other, names):
            if "manager" in (name, other.name):
                self._excuse(name, fault.for_s)
                self._excuse(other.name, fault.for_s)
            cut(other.name)
        return end

    def _with_each_peer(self, name: str, begin: Callable[[str], None]) -> End:
        """Calls `begin` with the name of each other process, also of those that start until the end."""
        begun = {name}

        def begin_once(peer: str) -> None:
            if peer not in begun:
                begun.add(peer)
                begin(peer)

        on_listen = self._cluster.network.on_listen
        on_listen.append(begin_once)
        for peer in self._targets.all_names():
            begin_once(peer)
        return lambda: on_listen.remove(begin_once)

    def _spoil_links(self, fault: ScheduledFault, target: FaultTarget) -> End:
        network, name = self._cluster.network, target.name
        links: list[FaultyLink] = []
        field = {
            FaultKind.DELAY: "delay_s",
            FaultKind.LOSE: "loss",
            FaultKind.DUPLICATE: "duplication",
        }[fault.kind]

        def spoil(peer: str) -> None:
            for link in (network.link(name, peer), network.link(peer, name)):
                links.append(link)
                setattr(link, field, fault.value)

        end_of_newcomers = self._with_each_peer(name, spoil)

        def end() -> None:
            end_of_newcomers()
            for link in links:
                setattr(link, field, 0.0)

        return end

    def _change_role(self, name: str, role: str) -> End | None:
        """The scheduler changes the role of an instance, and later changes it back."""
        instance = self._cluster.platform.instances.get(name)
        if instance is None or instance.role == "neutral":
            return None
        self._operations.has_changed_roles = True
        self._set_role(name, role)
        return lambda: self._set_role(name, instance.role)

    def _set_role(self, name: str, role: str) -> None:
        scheduler = self._cluster.platform.scheduler
        if scheduler is not None:
            process, _, wire = scheduler
            process.call_soon(wire.send, name, SetRole(role))

    def _flip(self, name: str) -> None:
        """Flips one bit of a block whose request has tokens to come, and no other request shares it."""
        engine = self._cluster.platform.instances[name].engine
        pool = engine.batcher.pool
        found = [
            (sequence, block)
            for sequence in engine.batcher.running
            if sequence.is_decoding and len(sequence.output) + 2 < sequence.max_tokens
            for block in sequence.blocks[: engine.batcher.num_blocks(sequence.computed)]
            if pool.num_references(block) == 1
        ]
        if not found or self._cluster.shape.prefix_caching:
            return
        sequence, block = self._rng.choice(found)
        pool.content[block] ^= 1 << self._rng.randrange(64)
        self._clients.tainted.add(int(sequence.request_id.partition(".")[0]))
        self.flips.append((sequence.request_id, self.num_computed_anew()))

    def num_computed_anew(self) -> int:
        """How often requests have computed their blocks anew: preemptions on living instances, recomputes."""
        instances = self._cluster.platform.instances.values()
        preemptions = sum(instance.engine.batcher.preemptions for instance in instances)
        return preemptions + sum(self._cluster.recoveries[reason] for reason in get_args(RecomputeReason))
