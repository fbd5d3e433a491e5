"""Instances of `FakeEngine` and `MigrationCoordinator` on a network that loses, doubles and delays.

The front end takes tokens with the real `TokenLedger` and does what the request router does: it tells stale
owners to end, and recomputes what dies with an instance.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

from migration.bounds import MigrationBounds
from migration.coordinator import MigrationCoordinator
from migration.destination_table import DestinationState
from migration.engine_interface import EngineEvents
from migration.messages import AnyMigrationMessage, InstanceId, MigrationMessage, RequestId
from migration.record import MigrationRecord
from migration.source_table import SourceState
from migration.tasks import BackgroundTasks
from migration.transport.local import LocalFabric
from pd_serve.errors import DestinationRefusedError, SourceGoneError
from pd_serve.frontend.token_ledger import TokenLedger
from tests.unit.migration.fake_engine import FakeEngine, Output, Payload, expected_output

LATENCY_S = 0.001
COPY_S = 0.02

BOUNDS = MigrationBounds(
    reply_s=1.0,
    copy_s=2.0,
    keep_alive_s=0.2,
    acknowledge_s=0.2,
    questions=5,
    lease_s=1.0,
    tail_s=1.0,
    log_s=5.0,
    max_outgoing=16,
    max_incoming=16,
    max_stages=8,
)

Kind = type[MigrationMessage]
Link = tuple[InstanceId, InstanceId]


class Network:
    """One queue per direction, so that messages between two instances keep their order."""

    def __init__(self, deliver: Callable[[InstanceId, InstanceId, AnyMigrationMessage], None]) -> None:
        self.sent: list[AnyMigrationMessage] = []
        self._deliver = deliver
        self._links: dict[Link, deque[AnyMigrationMessage]] = defaultdict(deque)
        self._held: set[Link] = set()
        self._hold_at: set[Kind] = set()
        self._lose: dict[Kind, float] = defaultdict(float)
        self._double: set[Kind] = set()
        self._cut: set[InstanceId] = set()
        self.chance: Callable[[], bool] = lambda: False  # of losing any message

    def lose(self, kind: Kind, times: float = float("inf")) -> None:
        self._lose[kind] = times

    def double(self, kind: Kind) -> None:
        """Every such message comes a second time, after a while."""
        self._double.add(kind)

    def hold_at(self, kind: Kind) -> None:
        """The first message of this kind, and all behind it, wait for `let_go`."""
        self._hold_at.add(kind)

    def cut(self, *instances: InstanceId) -> None:
        """Nothing goes to or from these instances."""
        self._cut.update(instances)

    def heal(self) -> None:
        """No faults from now on. What was held arrives."""
        self._cut.clear()
        self._lose.clear()
        self._double.clear()
        self.chance = lambda: False
        self.let_go()

    def let_go(self) -> None:
        self._hold_at.clear()
        held, self._held = self._held, set()
        for link in held:
            for _ in self._links[link]:
                self._schedule(link, LATENCY_S)

    def send(self, source: InstanceId, destination: InstanceId, message: AnyMigrationMessage) -> None:
        kind, link = type(message), (source, destination)
        self.sent.append(message)
        if {source, destination} & self._cut or self.chance():
            return
        if self._lose[kind] > 0:
            self._lose[kind] -= 1
            return
        self._links[link].append(message)
        if kind in self._hold_at:
            self._held.add(link)
        self._schedule(link, LATENCY_S)
        if kind in self._double:
            asyncio.get_running_loop().call_later(0.05, self._send_again, link, message)

    def _send_again(self, link: Link, message: AnyMigrationMessage) -> None:
        self._links[link].append(message)
        self._schedule(link, LATENCY_S)

    def _schedule(self, link: Link, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._deliver_next, link)

    def _deliver_next(self, link: Link) -> None:
        if link not in self._held and self._links[link]:
            self._deliver(*link, self._links[link].popleft())


@dataclass
class Node:
    name: InstanceId
    engine: FakeEngine
    coordinator: MigrationCoordinator
    outcomes: list[MigrationRecord] = field(default_factory=list)
    forwards: dict[str, str] = field(default_factory=dict)  # to pass aborts on
    failures: list[BaseException] = field(default_factory=list)
    alive: bool = True


@dataclass
class Route:
    payload: Payload
    ledger: TokenLedger
    ended: asyncio.Event
    committed_to: str = ""
    aborted: bool = False
    recomputes: int = 0


class Cluster:
    """Leave it with `async with`; entered, it serves.

    Args:
        engine_options: For every `FakeEngine`.
    """

    def __init__(self, *names: str, bounds: MigrationBounds = BOUNDS, **engine_options: int) -> None:
        self.network = Network(self._deliver)
        self.fabric = LocalFabric(latency_s=COPY_S, timeout_s=60.0)
        self.nodes = {name: self._node(InstanceId(name), bounds, engine_options) for name in names}
        self.routes: dict[str, Route] = {}
        self._tasks = BackgroundTasks(self._failed)
        self._failures: list[BaseException] = []

    async def __aenter__(self) -> "Cluster":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.cancel()
        for node in self.nodes.values():
            await node.coordinator.close()
            await node.engine.stop()
        if kind is None:
            failures = self._failures + [f for node in self.nodes.values() for f in node.failures]
            assert not failures, failures

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def _node(self, name: InstanceId, bounds: MigrationBounds, options: dict[str, int]) -> Node:
        node: Node
        events = EngineEvents(
            on_prefill_started=lambda request_ids: self._prefill_started(node, request_ids),
            on_requests_ended=lambda request_ids: node.coordinator.requests_ended(request_ids),
            on_load=lambda load: None,
            on_death=lambda error: None,
        )
        engine = FakeEngine(lambda output: self._say(node, output), events, **options)
        transport = self.fabric.transport(name)
        transport.register(engine.regions)
        coordinator = MigrationCoordinator(
            name,
            engine,
            transport,
            lambda peer, message: self.network.send(name, peer, message),  # type: ignore[arg-type]
            bounds=bounds,
            on_ended=lambda outcome: self._report(node, outcome),
            on_failure=lambda error: node.failures.append(error),
        )
        node = Node(name, engine, coordinator)
        return node

    def _deliver(self, source: InstanceId, destination: InstanceId, message: AnyMigrationMessage) -> None:
        if self.nodes[destination].alive:
            self.nodes[destination].coordinator.on_message(source, message)

    # ---- requests

    async def add(
        self, name: str, prompt: list[int], max_tokens: int, request_id: str = "r", handoff: bool = False
    ) -> RequestId:
        """Gives an instance a request. With `handoff`, it goes to any other at its first step."""
        payload = Payload(RequestId(request_id), prompt, max_tokens)
        self.routes[request_id] = Route(payload, TokenLedger(name), asyncio.Event())
        await self[name].engine.add(payload.encode(), "client", handoff=handoff)
        return payload.request_id

    async def tokens(self, number: int, request_id: str = "r") -> None:
        """Returns when the client has so many tokens."""
        while len(self.routes[request_id].ledger.token_ids) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def migrate(self, source: str, destination: str, request_id: str = "r") -> MigrationRecord | str:
        """Its outcome, or why it did not even begin."""
        try:
            return await self[source].coordinator.migrate(
                RequestId(request_id), InstanceId(destination), "test"
            )
        except (SourceGoneError, DestinationRefusedError) as error:
            return str(error)

    def start_migration(
        self, source: str, destination: str, request_id: str = "r"
    ) -> "asyncio.Task[MigrationRecord | str]":
        return self._tasks.start(self.migrate(source, destination, request_id))

    def abort(self, request_id: str = "r") -> None:
        """The client leaves."""
        route = self.routes[request_id]
        route.aborted = True
        route.ended.set()
        self._tasks.start(self._abort(route.ledger.owner, request_id, None))

    async def end(self, request_id: str = "r") -> None:
        async with asyncio.timeout(300):
            await self.routes[request_id].ended.wait()

    def states(
        self, source: str, destination: str, request_id: str = "r"
    ) -> tuple[SourceState | None, DestinationState | None]:
        """Where a request's migration is now, as far as the two instances know of one."""
        outgoing = self[source].coordinator._by_request.get(RequestId(request_id))
        incoming = [m for m in self[destination].coordinator._incoming.values() if m.request_id == request_id]
        return outgoing and outgoing.machine.state, incoming[-1].machine.state if incoming else None

    async def until(self, source: SourceState, destination: DestinationState | None) -> None:
        """Waits for both states of the migration of r from a to b."""
        async with asyncio.timeout(10):
            while self.states("a", "b") != (source, destination):  # noqa: ASYNC110
                await asyncio.sleep(0.0005)

    # ---- the front end

    def _say(self, node: Node, output: Output) -> None:
        asyncio.get_running_loop().call_later(LATENCY_S, self._hear, node, output)

    def _hear(self, node: Node, output: Output) -> None:
        route = self.routes[output.request_id]
        if not node.alive:
            return  # what it has said last dies with it
        if route.ended.is_set():
            if not output.finished:
                self._tasks.start(self._abort(node.name, output.request_id, None))
            return
        heard = _Heard(list(output.token_ids), "length" if output.finished else None)
        now = asyncio.get_running_loop().time()
        _, stale = route.ledger.accept(node.name, output.epoch, output.index, heard, now)
        if stale:
            self._tasks.start(self._abort(node.name, output.request_id, output.epoch + 1))
        if route.ledger.finished:
            route.ended.set()

    def _report(self, node: Node, outcome: MigrationRecord) -> None:
        node.outcomes.append(outcome)
        if outcome.committed:
            node.forwards[outcome.request_id] = outcome.destination
            asyncio.get_running_loop().call_later(
                LATENCY_S, self._hear_of_commit, node.name, outcome.destination, outcome.request_id
            )

    def _hear_of_commit(self, source: str, destination: str, request_id: str) -> None:
        route = self.routes[request_id]
        if not route.ended.is_set() and source in (route.ledger.owner, route.committed_to):
            if self[destination].alive:
                route.committed_to = destination
            else:
                self._recompute(route)

    async def _abort(self, name: str, request_id: str, below_epoch: int | None) -> None:
        await asyncio.sleep(LATENCY_S)
        node = self[name]
        if node.alive:
            unknown = await node.engine.abort([RequestId(request_id)], below_epoch)
            next_owner = node.forwards.pop(request_id, None) if unknown else None
            if next_owner is not None:
                await self._abort(next_owner, request_id, below_epoch)

    def _recompute(self, route: Route) -> None:
        route.committed_to = ""
        route.recomputes += 1
        survivor = next(node for node in self.nodes.values() if node.alive)
        epoch = route.ledger.take_over(survivor.name)
        self._tasks.start(self._add_again(survivor, route, epoch, list(route.ledger.token_ids)))

    async def _add_again(self, node: Node, route: Route, epoch: int, tokens: list[int]) -> None:
        request_id = route.payload.request_id
        await asyncio.sleep(LATENCY_S)
        await node.coordinator.expel(request_id)
        await node.engine.abort([request_id], epoch)
        await node.engine.add(route.payload.encode(), "client", epoch=epoch, output_token_ids=tokens)

    def _prefill_started(self, node: Node, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            other = next(name for name in self.nodes if name != node.name)
            self.start_migration(node.name, other, request_id)

    def _failed(self, error: BaseException) -> None:
        self._failures.append(error)

    # ---- death

    async def kill(self, name: str, *, peers_know: bool) -> None:
        """The front end learns of every death, peers perhaps only from the silence."""
        node = self[name]
        node.alive = False
        self.network.cut(node.name)
        self.fabric.fail(name)
        await node.coordinator.close()
        await node.engine.stop()
        if peers_know:
            for other in self.nodes.values():
                if other.alive:
                    other.coordinator.peer_lost(node.name)
        for route in self.routes.values():
            lost = name in (route.ledger.owner, route.committed_to) or route.ledger.has_gap
            if lost and not route.ended.is_set():
                self._recompute(route)

    # ---- the end

    async def problems(self) -> list[str]:
        found = []
        for node in self.nodes.values():
            if node.alive:
                for problem in [*await node.engine.check_integrity(), *node.coordinator.check_integrity()]:
                    found.append(f"{node.name}: {problem}")
                for request_id in await node.engine.live_requests():
                    found.append(f"{node.name}: {request_id} lives")
        return found

    async def check(self) -> None:
        """Every request has its whole output; and soon nothing is held anywhere, all tables are empty."""
        for request_id, route in self.routes.items():
            await self.end(request_id)
            tokens = route.ledger.token_ids
            expected = expected_output(route.payload.prompt, route.payload.max_tokens)
            assert tokens == (expected[: len(tokens)] if route.aborted else expected), request_id
        patience_s = 30.0
        while problems := await self.problems():
            assert patience_s > 0, problems
            patience_s -= 0.1
            await asyncio.sleep(0.1)
        for node in self.nodes.values():
            assert not node.alive or len(node.engine.free) == node.engine.num_blocks
        await asyncio.sleep(BOUNDS.log_s + BOUNDS.lease_s)
        for node in self.nodes.values():
            assert not node.alive or not node.coordinator._incoming, "the log of commits does not end"


@dataclass
class _Heard:
    """What the ledger reads of vLLM's `EngineCoreOutput`."""

    new_token_ids: list[int]
    finish_reason: str | None
    new_logprobs: None = None
