"""A simulated engine behind the same interface as vLLM's, in the virtual or real time of its event loop.

It batches, preempts, caches and migrates. Its tokens depend on the contents of all blocks of their request.
"""

import asyncio
from collections.abc import Callable, Collection
from typing import TypeVar

from migration.engine_interface import (
    EngineEvents,
    EngineFacts,
    HeldBlocks,
    HeldByClient,
    RunningRequest,
    StepProgress,
)
from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import FinalState, KvPart, MigrationId, RequestDescription, RequestId
from migration.reservation import Reservation
from migration.transport.kv_transport import KvRegion
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.batcher import Batcher
from pd_serve.simulated_engine.cached_keys import SimulatedKeys, key_format
from pd_serve.simulated_engine.emitter import OutputSink, SequenceEmitter
from pd_serve.simulated_engine.engine_steps import EngineSteps
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulated_engine.migrations import PendingStage, SequenceMigrations
from pd_serve.simulated_engine.prefix_store import SimulatedPrefixStore
from pd_serve.simulated_engine.sequence import Sequence
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.step_loop import SimulatedStepLoop
from pd_serve.simulated_engine.utilities import call_utility
from router.load import EngineLoad

T = TypeVar("T")


class SimulatedEngine:
    """Implements `migration.engine_interface.Engine`.

    Args:
        decode: Makes a sequence of a request's payload. Raises: InvalidRequestError.
        is_copying, delivery_s: See `EngineSteps`.
        faults: Delays and refusals of calls, and steps that hang, for tests.
        keep_ended_s: Time that ended requests are kept for clients that come back, in seconds.

    Attributes:
        sequences: The requests here by id, arriving ones excepted.
    """

    def __init__(
        self,
        settings: EngineSettings,
        decode: Callable[[list[bytes]], Sequence],
        sink: OutputSink,
        events: EngineEvents,
        is_copying: Callable[[], bool] = lambda: False,
        delivery_s: Callable[[], float] | None = None,
        faults: EngineFaults | None = None,
        keep_ended_s: float = 0.0,
    ) -> None:
        self.settings = settings
        self.workers: tuple[()] = ()  # the memory is in this process
        self.batcher = Batcher(settings, self._prefill_started)
        #: The blocks' contents, for a transport: one number each.
        self.regions = [KvRegion(*self.batcher.pool.content.buffer_info(), 8)]
        self.sequences: dict[str, Sequence] = {}
        self._decode, self._events, self._faults = decode, events, faults
        self._loop = asyncio.get_running_loop()
        self._emitter = SequenceEmitter(self.sequences, sink, self._loop.time, keep_ended_s)
        self._migrations = SequenceMigrations(self.batcher, self.sequences, self._is_in_flight)
        self._steps = EngineSteps(
            self.batcher,
            self._migrations,
            self._emitter,
            events,
            self._end,
            is_copying,
            delivery_s,
            faults,
        )
        self._step_loop = SimulatedStepLoop(self._steps, one_ahead=settings.async_scheduling)
        self.cached_keys = SimulatedKeys(self.batcher.pool, self._steps.compute_ended)
        self.prefixes = SimulatedPrefixStore(self.batcher, self._migrations, decode, self._call)
        self._step_loop.submit(lambda: None)

    @property
    def facts(self) -> EngineFacts:
        settings = self.settings
        max_tokens = (settings.num_blocks - self.batcher.watermark_blocks) * settings.block_tokens
        blocks, keys = (settings.num_blocks, settings.block_tokens), key_format(settings)
        return EngineFacts(None, max_tokens, *blocks, ("generate",), keys)

    @property
    def progress(self) -> StepProgress:
        return self._step_loop.progress

    async def start(self) -> None:
        """Nothing has to be loaded."""

    async def stop(self) -> None:
        """Ends all steps; pending calls are never answered."""
        self._step_loop.stop()

    # ---- requests

    async def add(
        self,
        payload: list[bytes],
        client: str,
        *,
        epoch: int = 0,
        output_token_ids: list[int] | None = None,
        handoff: bool = False,
    ) -> bool:
        sequence = self._decode(payload)
        sequence.client, sequence.epoch, sequence.wants_handoff = client, epoch, handoff
        sequence.continue_after(output_token_ids or ())
        sequence.added_at = self._loop.time()
        tokens, blocks = sequence.prompt_tokens + sequence.max_tokens, self.settings.num_blocks
        if self.batcher.num_blocks(tokens) > blocks - self.batcher.watermark_blocks:
            raise InvalidRequestError(f"{tokens} tokens do not fit into {blocks} blocks")

        def add() -> bool:
            if not self._end_below(sequence.request_id, epoch):
                return False
            self.sequences[sequence.request_id] = sequence
            self.batcher.enqueue(sequence)
            return True

        return await self._call("add", add)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        def abort() -> list[RequestId]:
            unknown = []
            for request_id in request_ids:
                if (sequence := self.sequences.get(request_id)) is None:
                    unknown.append(request_id)
                elif below_epoch is None or sequence.epoch < below_epoch:
                    self._end(sequence)
            return unknown

        return await self._call("abort", abort)

    async def abort_client(self, client: str) -> None:
        def abort_client() -> None:
            for sequence in [s for s in self.sequences.values() if s.client == client]:
                self._end(sequence)

        await self._call("abort_client", abort_client)

    # ---- source

    async def running_requests(self) -> list[RunningRequest]:
        return await self._call(
            "running_requests",
            lambda: [
                RunningRequest(s.request_id, s.priority, s.num_tokens, s.rank)
                for s in self.batcher.running
                if s.is_decoding
            ],
        )

    async def describe(self, request_id: RequestId) -> RequestDescription:
        def describe() -> RequestDescription:
            self._send_waiting(request_id)
            return self._migrations.describe(request_id)

        return await self._call("describe", describe)

    async def next_stage(
        self, request_id: RequestId, incarnation: int, tokens_done: int, *, suspend: bool, reader: MigrationId
    ) -> KvPart | FinalState:
        answer: asyncio.Future[KvPart | FinalState] = self._loop.create_future()

        def wait() -> None:
            sequence = self.sequences.get(request_id)
            waiter = PendingStage(sequence, incarnation, tokens_done, suspend, reader, answer)
            self._migrations.wait_for_stage(request_id, waiter)

        self._step_loop.submit(wait)
        return await answer

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        def resume() -> None:
            self._send_waiting(request_id)
            self._migrations.resume(request_id, epoch)

        await self._call("resume", resume)

    async def release(self, request_id: RequestId) -> None:
        def release() -> None:
            if (sequence := self._migrations.suspended.get(request_id)) is not None:
                self._forget(sequence)

        await self._call("release", release)

    async def unpin(self, reader: MigrationId) -> None:
        await self._call("unpin", lambda: self._migrations.unpin(reader))

    # ---- destination

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        arriving = self._decode(request.payload)
        arriving.client, arriving.epoch = request.client, request.epoch
        arriving.output = list(request.output_token_ids)
        return await self._call("reserve", lambda: self._migrations.reserve(migration_id, arriving, request))

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> list[list[int]]:
        return await self._call("grow", lambda: self._migrations.grow(migration_id, num_tokens))

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        def commit() -> None:
            arriving = self._migrations.arriving_sequence(migration_id)
            if not self._end_below(arriving.request_id, state.epoch + 1):
                raise DestinationRefusedError(RefusalCode.SUPERSEDED, "a newer copy of the request is here")
            self._migrations.commit(migration_id, state)

        await self._call("commit", commit)

    async def publish(self, migration_id: MigrationId) -> None:
        await self._call("publish", lambda: self._migrations.publish(migration_id))

    async def drop(self, migration_id: MigrationId) -> None:
        def drop() -> None:
            if (committed := self._migrations.drop(migration_id)) is not None:
                self._end(committed)

        await self._call("drop", drop)

    # ---- state

    async def clients_of(self, stem: str) -> set[str]:
        return await self._call("clients_of", lambda: self._emitter.clients_of(stem))

    async def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> bool:
        def adopt() -> bool:
            self._steps.send(self.sequences.values())
            if (former := self._emitter.adopt(request_id, payload, client, living)) is None:
                return False
            self._migrations.keep(former)
            self._loop.call_soon(self._events.on_requests_ended, [former])
            self._emitter.resend([(request_id, 0)], self._loop.time())
            return True

        return await self._call("adopt", adopt)

    async def visit_requests(self, visit: Callable[[HeldByClient], T]) -> T:
        return await self._call("visit_requests", lambda: visit(self._emitter.held()))

    async def resend(self, asked: list[tuple[RequestId, int]]) -> None:
        await self._call("resend", lambda: self._emitter.resend(asked, self._loop.time()))

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        def live_requests() -> list[RequestId]:
            return [s.request_id for s, _ in self._held() if client in (None, s.client)]

        return await self._call("live_requests", live_requests)

    async def held_blocks(self) -> list[HeldBlocks]:
        return await self._call(
            "held_blocks",
            lambda: [HeldBlocks(s.request_id, len(s.blocks), comes) for s, comes in self._held() if s.blocks],
        )

    async def utility(self, method: str, *arguments: object) -> object:
        return await self._call("utility", lambda: call_utility(self.batcher.pool, method))

    async def check_integrity(self, under_way: Collection[MigrationId] = ()) -> list[str]:
        def check_integrity() -> list[str]:
            held = [block for sequence, _ in self._held() for block in sequence.blocks]
            held += [block for pinned in self._migrations.pinned.values() for block in pinned]
            held += self.prefixes.held_blocks
            return self.batcher.pool.check_integrity(held) + self._migrations.check_integrity(under_way)

        return await self._call("check_integrity", check_integrity)

    def load(self) -> EngineLoad:
        return self._steps.load()

    @property
    def steps(self) -> int:
        """Steps that have ended, without those of the run in progress."""
        return self._steps.steps

    @property
    def busy_s(self) -> float:
        """Time that the steps take together."""
        return self._steps.busy_s

    def pace_changes(self) -> None:
        """`is_copying` has changed: the steps after the one in progress may take another time."""
        self._step_loop.cut_run()

    def preempt(self, request_id: str) -> None:
        """Takes a running request's blocks away, as if others needed them; for tests."""
        self._steps.compute_ended()
        self._step_loop.cut_run()
        if (sequence := self.sequences.get(request_id)) in self.batcher.running and sequence is not None:
            self.batcher.preempt(sequence, self._loop.time())

    # ---- helpers

    def _prefill_started(self, started: list[Sequence]) -> None:
        describe = self._migrations.describe
        self._events.on_prefill_started([describe(RequestId(s.request_id)) for s in started])

    def _is_in_flight(self, sequence: Sequence) -> bool:
        return (step := self._step_loop.in_flight) is not None and sequence in step.decodes

    def _held(self) -> list[tuple[Sequence, bool]]:
        """Sequences that may hold something here, and whether they are arriving."""
        arriving = [(sequence, True) for sequence in self._migrations.arriving.values()]
        return [(sequence, False) for sequence in self.sequences.values()] + arriving

    def _end(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self._loop.call_soon(self._events.on_requests_ended, [sequence.request_id])

    def _end_below(self, request_id: RequestId, epoch: int) -> bool:
        """Ends an older copy of a request. Returns False if the one here is not older."""
        if (sequence := self.sequences.get(request_id)) is None:
            return True
        if sequence.epoch < epoch:
            self._end(sequence)
        return sequence.epoch < epoch

    def _send_waiting(self, request_id: RequestId) -> None:
        """Sends the tokens of a request that have waited for later ones."""
        self._steps.send([self.sequences.get(request_id)])

    def _forget(self, sequence: Sequence) -> None:
        self._steps.send([sequence])
        self.batcher.remove(sequence)
        self.sequences.pop(sequence.request_id, None)
        self._migrations.forget(sequence.request_id)

    async def _call(self, name: str, function: Callable[[], T]) -> T:
        if self._faults is not None:
            await self._faults.before(name)
        return await self._step_loop.call(function)
