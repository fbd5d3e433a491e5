"""Migration coordinators between simulated engines, on the simulated network with faults.

The front end takes tokens with the real `TokenLedger` and does what an API server does: it ends stale
copies, and recomputes what dies with an instance.
"""

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from migration.bounds import MigrationBounds
from migration.coordinator import MigrationCoordinator
from migration.destination_table import DestinationState
from migration.engine_interface import EngineEvents
from migration.errors import MigrationError, Refusal
from migration.messages import (
    AnyMigrationMessage,
    InstanceId,
    MigrationMessage,
    RequestDescription,
    RequestId,
)
from migration.prefix_messages import AnyPrefixMessage, PrefixMessage
from migration.record import MigrationRecord
from migration.source_table import SourceState
from migration.tasks import BackgroundTasks
from migration.token_span import TokenSpan
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.simulated_engine.contents import expected_output
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulated_engine.outputs import SimulatedOutput, SimulatedPayload, decode_payload
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.message_faults import MessageFaults
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire

LATENCY_S = 0.001
COPY_S = 0.02
BLOCK_TOKENS = 4

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
    prefix_reply_s=0.5,
    prefix_read_s=1.0,
    prefix_lease_s=2.0,
    max_prefix_leases=4,
    max_stages=8,
)


class ConstantSteps:
    """A cost model whose steps all take `step_s`, which a test may change."""

    def __init__(self, step_s: float = 0.01) -> None:
        self.step_s = step_s

    def prefill_s(self, chunks: object) -> float:
        return self.step_s

    def decode_s(self, batch_size: int, context_tokens: int) -> float:
        return self.step_s

    def mixed_s(self, chunks: object, batch_size: int, context_tokens: int) -> float:
        return self.step_s


@dataclass
class Node:
    name: InstanceId
    engine: SimulatedEngine
    faults: EngineFaults
    coordinator: MigrationCoordinator
    records: list[MigrationRecord] = field(default_factory=list)
    forwards: dict[str, str] = field(default_factory=dict)  # to pass aborts on
    failures: list[BaseException] = field(default_factory=list)
    alive: bool = True


@dataclass
class Route:
    payload: SimulatedPayload
    ledger: TokenLedger
    ended: asyncio.Event
    committed_to: str = ""
    aborted: bool = False
    recomputes: int = 0


class MigratingCluster:
    """Leave it with `async with`; entered, it serves.

    Args:
        settings: Of every engine.

    Attributes:
        sent: Every migration message, in order.
        steps: Duration of all engines' steps.
    """

    def __init__(self, *names: str, bounds: MigrationBounds = BOUNDS, **settings: Any) -> None:
        self.steps = ConstantSteps()
        self.network = SimulatedNetwork(
            NetworkSettings(message_latency_s=LATENCY_S, kv_latency_s=COPY_S, kv_bytes_per_s=1e12), 1.0
        )
        self.faults = self.network.faults = MessageFaults()
        self.fabric = self.network.fabric
        self.sent: list[MigrationMessage | PrefixMessage] = []
        self.routes: dict[str, Route] = {}
        self._tasks = BackgroundTasks(self._failed)
        self._failures: list[BaseException] = []
        base = {"num_blocks": 64, "max_num_seqs": 16, "chunk_tokens": 8, "prefix_caching": True}
        self.settings = EngineSettings(
            self.steps, block_tokens=BLOCK_TOKENS, watermark=0.0, **(base | settings)
        )
        self.nodes = {name: self._node(InstanceId(name), bounds) for name in names}

    async def __aenter__(self) -> "MigratingCluster":
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

    def _node(self, name: InstanceId, bounds: MigrationBounds) -> Node:
        node: Node
        events = EngineEvents(
            on_prefill_started=lambda started: self._prefill_started(node, started),
            on_requests_ended=lambda request_ids: node.coordinator.requests_ended(request_ids),
            on_load=lambda load: None,
            on_death=lambda error: None,
        )

        def sink(client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
            asyncio.get_running_loop().call_later(LATENCY_S, self._on_outputs, node, outputs, spans)

        faults = EngineFaults()
        engine = SimulatedEngine(self.settings, decode_payload, sink, events, faults=faults)
        transport = self.fabric.transport(name)
        transport.register(engine.regions)
        wire = SimulatedWire(name, self.network)
        address = wire.listen_for_frames(lambda frames: self._on_message(node, frames[0], frames[1]))

        def send(peer: InstanceId, message: MigrationMessage | PrefixMessage) -> None:
            self.sent.append(message)
            wire.connect(peer, f"{peer}/0")
            wire.send(peer, message)

        assert address == f"{name}/0"
        coordinator = MigrationCoordinator(
            name,
            engine,
            transport,
            send,
            bounds=bounds,
            on_ended=lambda record: self._on_migration_ended(node, record),
            on_failure=lambda error: node.failures.append(error),
        )
        node = Node(name, engine, faults, coordinator)
        return node

    def _on_message(self, node: Node, sender: str, message: AnyMigrationMessage | AnyPrefixMessage) -> None:
        if node.alive:
            node.coordinator.on_message(InstanceId(sender), message)

    # ---- requests

    async def add(
        self,
        name: str,
        prompt_tokens: int,
        max_tokens: int,
        request_id: str = "r",
        *,
        seed: int = 0,
        handoff: bool = False,
    ) -> None:
        """Gives an instance a request. With `handoff`, it goes to any other at its first step.

        Args:
            seed: Prompts of one seed have the same contents.
        """
        payload = SimulatedPayload(request_id, prompt_tokens, max_tokens, 0, len(self.routes), (), seed)
        self.routes[request_id] = Route(payload, TokenLedger(name), asyncio.Event())
        await self[name].engine.add(payload.encode(), "client", handoff=handoff)

    async def fill_prefix_cache(self, name: str, prompt_tokens: int, max_tokens: int, seed: int = 0) -> None:
        """Has an instance serve a request with the same prompt, so that its blocks are cached there."""
        request_id = f"cached on {name}"
        await self.add(name, prompt_tokens, max_tokens, request_id, seed=seed)
        await self.end(request_id)

    async def tokens(self, number: int, request_id: str = "r") -> None:
        """Returns when the client has this many tokens."""
        while len(self.routes[request_id].ledger.token_ids) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def migrate(
        self,
        source: str,
        destination: str,
        request_id: str = "r",
        *,
        blocking: bool = False,
        description: RequestDescription | None = None,
    ) -> MigrationRecord | Refusal:
        """The record of a migration, or why it did not even begin."""
        try:
            return await self[source].coordinator.migrate(
                RequestId(request_id),
                InstanceId(destination),
                "test",
                blocking=blocking,
                description=description,
            )
        except MigrationError as error:
            return error.refusal

    def start_migration(
        self, source: str, destination: str, request_id: str = "r", **options: Any
    ) -> "asyncio.Task[MigrationRecord | Refusal]":
        """Args: options: See `migrate`."""
        return self._tasks.start(self.migrate(source, destination, request_id, **options))

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
        return outgoing and outgoing.state_machine.state, incoming[
            -1
        ].state_machine.state if incoming else None

    async def until(self, source: SourceState, destination: DestinationState | None) -> None:
        """Waits for both states of the migration of r from a to b."""
        async with asyncio.timeout(10):
            while self.states("a", "b") != (source, destination):  # noqa: ASYNC110
                await asyncio.sleep(0.0005)

    # ---- the front end

    def _on_outputs(self, node: Node, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        if not node.alive:
            return  # its last tokens are lost with it
        for output, span in zip(outputs, spans, strict=True):
            self._on_output(node, output, span)

    def _on_output(self, node: Node, output: SimulatedOutput, span: TokenSpan) -> None:
        route = self.routes[output.request_id]
        if route.ended.is_set():
            if output.finish_reason is None:
                self._tasks.start(self._abort(node.name, output.request_id, None))
            return
        now = asyncio.get_running_loop().time()
        _, is_stale, is_fork = route.ledger.accept(node.name, span, output, now)
        if is_stale:
            self._tasks.start(self._abort(node.name, output.request_id, span[0] + 1))
        assert not is_fork, "simulated engines sample no other tokens after a move"
        if route.ledger.finished:
            route.ended.set()

    def _on_migration_ended(self, node: Node, record: MigrationRecord) -> None:
        node.records.append(record)
        if record.committed:
            node.forwards[record.request_id] = record.destination
            asyncio.get_running_loop().call_later(LATENCY_S, self._on_committed, record)

    def _on_committed(self, record: MigrationRecord) -> None:
        route = self.routes[record.request_id]
        if not route.ended.is_set() and record.source in (route.ledger.owner, route.committed_to):
            if self[record.destination].alive:
                route.committed_to = record.destination
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
        request_id = RequestId(route.payload.request_id)
        await asyncio.sleep(LATENCY_S)
        await node.engine.abort([request_id], epoch)
        await node.engine.add(route.payload.encode(), "client", epoch=epoch, output_token_ids=tokens)

    def _prefill_started(self, node: Node, started: list[RequestDescription]) -> None:
        for request in started:
            other = next(name for name in self.nodes if name != node.name)
            self.start_migration(node.name, other, request.request_id, description=request)

    def _failed(self, error: BaseException) -> None:
        self._failures.append(error)

    # ---- death

    async def kill(self, name: str, *, peers_know: bool) -> None:
        """The front end learns of every death, peers perhaps only from the silence."""
        node = self[name]
        node.alive = False
        self.network.cut(name)
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
            tokens, payload = route.ledger.token_ids, route.payload
            expected = expected_output(payload.prompt, payload.max_tokens, BLOCK_TOKENS)
            assert tokens == (expected[: len(tokens)] if route.aborted else expected), request_id
        patience_s = 30.0
        while problems := await self.problems():
            assert patience_s > 0, problems
            patience_s -= 0.1
            await asyncio.sleep(0.1)
        for node in self.nodes.values():
            assert not node.alive or node.engine.batcher.pool.num_free == self.settings.num_blocks
        await asyncio.sleep(BOUNDS.log_s + BOUNDS.lease_s)
        for node in self.nodes.values():
            assert not node.alive or not node.coordinator._incoming, "the log of commits does not end"
