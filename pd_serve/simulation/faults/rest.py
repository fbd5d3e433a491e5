"""What has to be true of a cluster at rest: the tables of all processes, compared with each other."""

from collections import Counter
from collections.abc import Iterator

from migration.tasks import BackgroundTasks
from pd_serve.simulated_engine.cached_keys import key_of
from pd_serve.simulation.faults.clients import Clients
from pd_serve.simulation.faults.cluster import FaultyCluster, SimulatedApiServer
from pd_serve.simulation.faults.operations import OperatorCalls
from pd_serve.simulation.faults.tables import num_tasks, remains
from pd_serve.simulation.simulated_instance import SimulatedInstance
from router.load import ROLES


class RestChecks:
    """Checks a cluster whose requests have all ended and whose faults are over."""

    def __init__(self, cluster: FaultyCluster, clients: Clients, operations: OperatorCalls) -> None:
        self._cluster = cluster
        self._clients = clients
        self._operations = operations
        self._tasks: dict[str, int] = {}

    def problems(self) -> list[str]:
        """Everything that is not as it has to be. What needs time to end is no problem only then."""
        found = list(self._unfinished())
        found = found or [*self._pools(), *self._members(), *self._held(), *self._known_blocks()]
        return found or list(self._remains())

    def _unfinished(self) -> Iterator[str]:
        for number in self._clients.unfinished:
            stream = self._clients.stream_of(number)
            has = f"has {len(stream.tokens)} of {stream.num_expected} tokens" if stream else "is not served"
            yield f"request {number} has not ended: it {has}{self._where(number)}"
        for what in self._operations.unanswered:
            yield f"not answered: {what}"
        if self._cluster.manager is None or not self._cluster.manager.is_open:
            yield "there is no manager"
        if self._cluster.platform.scheduler is None:
            yield "there is no scheduler"

    def _where(self, number: int) -> str:
        """Where each process believes a request to be."""
        stream = self._clients.stream_of(number)
        if stream is None:
            return ""
        known = stream.api_server.frontend.requests.requests.get(stream.request_id)  # type: ignore[call-overload]
        owner = f"{known.ledger.owner!r} (epoch {known.ledger.epoch})" if known else "no instance"
        held = [
            f"{name} (epoch {instance.engine.sequences[stream.request_id].epoch})"
            for name, instance in self._cluster.platform.instances.items()
            if stream.request_id in instance.engine.sequences
        ]
        return f"; {stream.api_server.name} expects them from {owner}, it runs on {', '.join(held) or 'none'}"

    # ---- pools

    def _pools(self) -> Iterator[str]:
        cluster = self._cluster
        instances = cluster.platform.instances
        for name in sorted(set(cluster.platform.actors) - set(instances)):
            yield f"{name} is being started"
        sizes = Counter(instance.llumlet.reporter.role for instance in instances.values())
        if self._operations.has_changed_roles:
            return
        for role in ROLES:
            if (bounds := cluster.shape.autoscale.get(role)) is not None:
                if not bounds[0] <= sizes[role] <= bounds[1]:
                    yield f"there are {sizes[role]} {role} instances, and the bounds are {bounds}"
            elif sizes[role] not in (wanted := self._wanted(role)):
                text = " or ".join(map(str, sorted(wanted)))
                yield f"there are {sizes[role]} {role} instances, and {text} are wanted"

    def _wanted(self, role: str) -> set[int]:
        """Possible sizes of a pool. Those that an operator has set are lost if all instances die at once."""
        wanted = self._operations.sizes.get(role, {0})
        is_new = self._cluster.num_first_starts > 1
        return wanted | {self._cluster.shape.instances.get(role, 0)} if is_new else wanted

    # ---- membership

    def _members(self) -> Iterator[str]:
        """Every process has the same members, and connections to them only."""
        cluster = self._cluster
        assert cluster.manager is not None
        assert cluster.platform.scheduler is not None
        manager = cluster.manager.manager
        instances = set(cluster.platform.instances)
        servers = {server.name for server in cluster.api_servers}
        _, scheduler, scheduler_wire = cluster.platform.scheduler
        yield from self._differs("the manager has the instances", set(manager.register.infos), instances)
        yield from self._differs(
            "the manager has the API servers", set(manager.announcer.api_servers), servers
        )
        yield from self._differs(
            "the scheduler has the loads of",
            {load.instance_id for load in scheduler.scheduler._loads},
            instances,
        )
        peers = instances | servers | {"manager", "scheduler"}
        views = [(server.name, server.wire, server.frontend._members) for server in cluster.api_servers]
        views += [(n, i.wire, i.llumlet._members) for n, i in cluster.platform.instances.items()]  # type: ignore[misc]
        views.append(("scheduler", scheduler_wire, scheduler._members))
        for name, wire, view in views:
            yield from self._differs(f"{name} has the instances", set(view.instances), instances)
            yield from self._differs(f"{name} has the API servers", set(view.api_servers), servers)
            yield from self._connections(name, wire.peers, peers - {name})
        for server in cluster.api_servers:
            loads = {load.instance_id for load in server.frontend.instances.loads}
            yield from self._differs(f"{server.name} has the loads of", loads, instances)
        wire = cluster.manager.wire
        yield from self._connections("manager", wire.peers, peers - {"manager"})
        for name, instance in cluster.platform.instances.items():
            drained = name in manager._stopper.drained_by_operator
            if instance.llumlet.reporter.drained_by_operator != drained:
                yield f"{name} is drained: {not drained}, and the manager says {drained}"

    def _differs(self, what: str, has: set[str], expected: set[str]) -> Iterator[str]:
        if has != expected:
            yield f"{what} {sorted(has)}, and there are {sorted(expected)}"

    def _connections(self, name: str, has: dict[str, str], expected: set[str]) -> Iterator[str]:
        """A process is connected to all others, at the addresses at which they listen."""
        if wrong := sorted(set(has) - expected):
            yield f"{name} is still connected to {wrong}"
        for peer, address in has.items():
            if not self._cluster.network.listens(address):
                yield f"{name} is connected to an earlier {peer} at {address}"

    # ---- what requests hold

    def _held(self) -> Iterator[str]:
        for server in self._cluster.api_servers:
            yield from self._held_by_api_server(server)
        for name, instance in self._cluster.platform.instances.items():
            yield from self._held_by_instance(name, instance)
        fabric = self._cluster.network.fabric
        for source, destination in fabric.reads:
            yield f"{destination} still reads KV of {source}"
        manager = self._cluster.manager
        if manager is not None:
            if coming := manager.manager._starter.rows():
                yield f"the manager still starts {[row.role for row in coming]}"
            if leaving := manager.manager._stopper.leaving:
                yield f"the manager still stops {sorted(leaving)}"
            if manager.manager._calls._waiting:
                yield "the manager waits for answers"

    def _held_by_api_server(self, server: SimulatedApiServer) -> Iterator[str]:
        tracker = server.frontend.requests
        if tracker.requests:
            yield f"{server.name} still has the requests {sorted(tracker.requests)}"
        if tracker.num_waiting:
            yield f"{server.name} counts {tracker.num_waiting} requests as waiting"
        if len(server.frontend._placement.line):
            yield f"{server.name} has requests in its line: {list(server.frontend._placement.line)}"
        if server.frontend.instances.calls._waiting:
            yield f"{server.name} waits for answers of instances"
        for load in server.frontend.instances.loads:
            projected = server.frontend.instances.loads.projected(load.instance_id)
            if projected.expected_blocks or projected.expected_requests:
                count = projected.expected_requests
                yield f"{server.name} expects {count} requests on their way to {load.instance_id}"
            if load.running or load.waiting or load.free_blocks != load.total_blocks:
                yield f"{server.name} has a load of {load.instance_id} that is not empty"

    def _known_blocks(self) -> Iterator[str]:
        """Every API server that needs it knows what is in the prefix cache of every instance."""
        for server in self._cluster.api_servers:
            prefixes = server.frontend.instances.loads.prefixes
            for name, instance in self._cluster.platform.instances.items():
                there = set(map(key_of, instance.engine.batcher.pool.hashes)) if prefixes.is_used else set()
                if (wrong := len(prefixes.keys(name) ^ there)) > 0:
                    yield f"{server.name} is wrong about {wrong} blocks in the prefix cache of {name}"

    def _held_by_instance(self, name: str, instance: SimulatedInstance) -> Iterator[str]:
        engine, llumlet = instance.engine, instance.llumlet
        batcher, migrations = engine.batcher, engine._migrations
        if engine.sequences:
            yield f"{name} still runs {sorted(engine.sequences)}"
        if held := batcher.pool.num_blocks - batcher.pool.num_free:
            yield f"{name} holds {held} KV blocks"
        if batcher.running or batcher.waiting or migrations.held_slots:
            yield f"{name} holds slots of its batch"
        coordinator = llumlet.coordinator
        assert coordinator is not None
        for problem in coordinator.check_integrity():
            yield f"{name}: {problem}"
        if waiting := llumlet.handoffs.unfinished:
            yield f"{name}: requests wait for a hand-off: {waiting}"

    # ---- tasks, and what is gone

    def _roots(self) -> Iterator[tuple[str, str, object]]:
        """Kind and name of each process, and the object that reaches all others of it."""
        cluster = self._cluster
        for name, instance in cluster.platform.instances.items():
            yield "instance", name, instance.llumlet
        for server in cluster.api_servers:
            yield "api", server.name, server.frontend
        if cluster.manager is not None:
            yield "manager", "manager", cluster.manager.manager
        if cluster.platform.scheduler is not None:
            yield "scheduler", "scheduler", cluster.platform.scheduler[1]

    def count_tasks(self) -> None:
        """Remembers how many tasks each kind of process has without requests."""
        roots = {kind: root for kind, _, root in self._roots()}
        self._tasks = {kind: num_tasks(root) for kind, root in roots.items()}

    def _remains(self) -> Iterator[str]:
        """No table of any process names an ended request, or a process that is gone."""
        cluster = self._cluster
        known = {"manager", "scheduler", *cluster.platform.actors}
        known |= {server.name for server in cluster.api_servers}
        gone = set(self._clients.streams) | (cluster.names - known)
        for kind, name, root in self._roots():
            tasks: list[BackgroundTasks] = []
            for found in remains(root, gone.__contains__, visit=tasks.append):
                yield f"{name}: {found}, which is gone"
            if (running := sum(map(len, tasks))) != self._tasks[kind]:
                yield f"{name} runs {running} tasks, and {self._tasks[kind]} without requests"
