"""A simulated engine behind the same seam as vLLM's: it batches, preempts, caches and migrates, and its
tokens depend on the contents of all KV blocks of their request.

It lives on an event loop and takes its time from there: virtual in a simulation, real behind a real API.
Like vLLM's it runs step after step and is visited between two of them.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from migration.engine_interface import (
    EngineEvents,
    EngineFacts,
    HeldBlocks,
    Reservation,
    RunningRequest,
)
from migration.messages import BlockRun, FinalState, MigrationId, RequestDescription, RequestId
from migration.transport.kv_transport import KvRegion
from pd_serve.errors import (
    DestinationRefusedError,
    EngineDeadError,
    InvalidRequestError,
    MigrationError,
    RefusalCode,
    SourceGoneError,
)
from pd_serve.simulated_engine.batcher import Batcher, Sequence, Step, held_blocks
from pd_serve.simulated_engine.outputs import SimulatedOutput
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import EngineLoad
from router.priority import PriorityClass, priority_class

T = TypeVar("T")

#: As in the adapter of vLLM: blocks reserved beyond what a request has, and blocks left when it is suspended.
SLACK_BLOCKS = 2
TAIL_BLOCKS = 2

#: Least time between two load reports if nothing has come or gone.
LOAD_INTERVAL_S = 0.1

#: Takes (client, outputs, spans) after every step; see `pd_serve.comm.messages.TokenHeader`.
OutputSink = Callable[[str, list[SimulatedOutput], list[tuple[int, int]]], None]


@dataclass(slots=True)
class _Waiter:
    """Somebody waits for the next stage of a request's migration."""

    incarnation: int
    blocks_done: int
    suspend: bool
    answer: "asyncio.Future[BlockRun | FinalState]"


class SimulatedEngine:
    """Implements `migration.engine_interface.Engine`.

    Args:
        decode: Makes a sequence of a request's payload. Raises: InvalidRequestError.
        is_copying: Whether KV is being copied into this instance or out of it, which slows its steps.

    Attributes:
        steps, busy_s: Steps begun and ended, and the time that they take together.
    """

    def __init__(
        self,
        settings: EngineSettings,
        decode: Callable[[list[bytes]], Sequence],
        sink: OutputSink,
        events: EngineEvents,
        is_copying: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self.batcher = Batcher(settings, self._prefill_started)
        self.steps = 0
        self.busy_s = 0.0
        self._decode = decode
        self._sink = sink
        self._events = events
        self._is_copying = is_copying
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, Sequence] = {}
        self._suspended: dict[str, Sequence] = {}
        self._arriving: dict[str, Sequence] = {}  # by migration id
        self._arrived: dict[str, str] = {}  # migration id by request id, once committed
        self._waiters: dict[str, _Waiter] = {}
        self._calls: list[Callable[[], None]] = []
        self._ended: list[RequestId] = []
        self._timer: asyncio.Handle | None = None
        self._reported: tuple[int, ...] = ()
        self._reported_at = 0.0
        self._stopped = False
        self._submit(lambda: None)

    @property
    def regions(self) -> list[KvRegion]:
        """The blocks' contents, for a transport: one number each."""
        return [KvRegion(*self.batcher.pool.content.buffer_info(), 8)]

    async def start(self) -> None:
        """Nothing is to be loaded; the first report of its load is on its way."""

    @property
    def facts(self) -> EngineFacts:
        settings = self.settings
        max_tokens = (settings.num_blocks - self.batcher.watermark_blocks) * settings.block_tokens
        return EngineFacts(None, max_tokens, settings.num_blocks, settings.block_tokens, ("generate",))

    async def stop(self) -> None:
        """Nothing comes from it any more; whoever waits for an answer waits for ever."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    # ---- requests

    async def add(
        self,
        payload: list[bytes],
        client: str,
        *,
        epoch: int = 0,
        output_token_ids: list[int] | None = None,
        handoff: bool = False,
    ) -> None:
        sequence = self._decode(payload)
        sequence.client, sequence.epoch = client, epoch
        sequence.wants_handoff = handoff
        sequence.output = list(output_token_ids or ())
        sequence.emitted = len(sequence.output)
        sequence.added_at = self._loop.time()
        most = self.batcher.num_blocks(sequence.prompt_tokens + sequence.max_tokens)
        if most > self.settings.num_blocks - self.batcher.watermark_blocks:
            raise InvalidRequestError(
                f"{sequence.prompt_tokens} + {sequence.max_tokens} tokens do not fit into"
                f" {self.settings.num_blocks} blocks"
            )

        def add() -> None:
            if sequence.request_id in self._live:
                raise InvalidRequestError("a request of this id is here already")
            self._live[sequence.request_id] = sequence
            self.batcher.enqueue(sequence)

        await self._call(add)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        def abort() -> list[RequestId]:
            unknown = []
            for request_id in request_ids:
                sequence = self._live.get(request_id)
                if sequence is None:
                    unknown.append(request_id)
                elif below_epoch is None or sequence.epoch < below_epoch:
                    self._end(sequence)
            return unknown

        return await self._call(abort)

    async def abort_client(self, client: str) -> None:
        def abort() -> None:
            for sequence in [s for s in self._live.values() if s.client == client]:
                self._end(sequence)

        await self._call(abort)

    # ---- source

    async def running_requests(self) -> list[RunningRequest]:
        return await self._call(
            lambda: [
                RunningRequest(RequestId(s.request_id), s.priority, s.num_tokens, s.rank)
                for s in self.batcher.running
                if s.is_decoding
            ]
        )

    async def describe(self, request_id: RequestId) -> RequestDescription:
        def describe() -> RequestDescription:
            sequence = self._live.get(request_id)
            if sequence is None or sequence not in self.batcher.running:
                raise SourceGoneError(RefusalCode.NOT_RUNNING, "the request is not running here")
            return RequestDescription(
                request_id=request_id,
                payload=sequence.payload,
                client=sequence.client,
                epoch=sequence.epoch,
                incarnation=sequence.preemptions,
                output_token_ids=list(sequence.output),
                num_prompt_tokens=sequence.prompt_tokens,
                max_total_tokens=sequence.prompt_tokens + sequence.max_tokens,
                compatibility={"block size": str(self.settings.block_tokens)},
            )

        return await self._call(describe)

    async def next_stage(
        self, request_id: RequestId, incarnation: int, blocks_done: int, *, suspend: bool
    ) -> BlockRun | FinalState:
        answer: asyncio.Future[BlockRun | FinalState] = self._loop.create_future()

        def wait() -> None:
            self._waiters[request_id] = _Waiter(incarnation, blocks_done, suspend, answer)

        self._submit(wait)
        return await answer

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        def resume() -> None:
            if (waiter := self._waiters.pop(request_id, None)) is not None:
                _settle(waiter.answer, SourceGoneError(RefusalCode.CANCELLED, "the migration was given up"))
            if (sequence := self._suspended.pop(request_id, None)) is not None:
                self.batcher.running.append(sequence)
            if (sequence := self._live.get(request_id)) is not None:
                sequence.epoch = max(sequence.epoch, epoch)

        await self._call(resume)

    async def release(self, request_id: RequestId) -> None:
        def release() -> None:
            if (sequence := self._suspended.pop(request_id, None)) is not None:
                self._forget(sequence)

        await self._call(release)

    # ---- destination

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        arriving = self._decode(request.payload)
        arriving.client, arriving.epoch = request.client, request.epoch
        arriving.output = list(request.output_token_ids)

        def reserve() -> Reservation:
            if request.compatibility != {"block size": str(self.settings.block_tokens)}:
                raise DestinationRefusedError(
                    RefusalCode.INCOMPATIBLE, f"block size: {self.settings.block_tokens} here"
                )
            if request.request_id in self._live or any(
                s.request_id == request.request_id for s in self._arriving.values()
            ):
                raise DestinationRefusedError(RefusalCode.ALREADY_HERE, "the request is here already")
            held = len(self.batcher.running) + len(self._suspended) + len(self._arriving)
            if held >= self.settings.max_num_seqs:
                text = f"all {held} slots of the batch are taken"
                raise DestinationRefusedError(RefusalCode.NO_BATCH_SLOT, text)
            shared: list[int] = []
            if self.settings.prefix_caching:
                full = (arriving.num_tokens - 1) // self.settings.block_tokens
                self.batcher.hash_blocks(arriving, full)
                shared = self.batcher.pool.cached(arriving.hashes)
                arriving.hashes.clear()
            pool = self.batcher.pool
            missing = self.batcher.num_blocks(arriving.num_tokens) + SLACK_BLOCKS - len(shared)
            if missing > pool.num_free - pool.num_unused(shared):
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} free KV blocks")
            pool.share(shared)
            arriving.blocks = shared + pool.allocate(missing)
            self._arriving[migration_id] = arriving
            return Reservation(list(arriving.blocks), len(shared))

        return await self._call(reserve)

    async def grow(self, migration_id: MigrationId, num_blocks: int) -> list[int]:
        def grow() -> list[int]:
            arriving = self._arriving_sequence(migration_id)
            missing = num_blocks - len(arriving.blocks)
            if missing > self.batcher.pool.num_free:
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} more free KV blocks")
            arriving.blocks += self.batcher.pool.allocate(max(0, missing))
            return list(arriving.blocks)

        return await self._call(grow)

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        def commit() -> None:
            sequence = self._arriving_sequence(migration_id)
            needed = self.batcher.num_blocks(sequence.prompt_tokens + len(state.output_token_ids))
            missing = needed - len(sequence.blocks)
            if missing > self.batcher.pool.num_free:
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} more free KV blocks")
            sequence.blocks += self.batcher.pool.allocate(max(0, missing))
            del self._arriving[migration_id]
            sequence.output = list(state.output_token_ids)
            sequence.emitted = len(sequence.output)
            sequence.epoch = state.epoch + 1
            sequence.computed = state.num_computed_tokens
            sequence.digest = self.batcher.read(sequence)
            if self.settings.prefix_caching:
                self.batcher.publish(sequence)
            self._arrived[sequence.request_id] = migration_id
            self._live[sequence.request_id] = sequence
            self.batcher.running.append(sequence)

        await self._call(commit)

    async def drop(self, migration_id: MigrationId) -> None:
        def drop() -> None:
            if (arriving := self._arriving.pop(migration_id, None)) is not None:
                self.batcher.release(arriving)
                return
            for request_id, brought_by in self._arrived.items():
                if brought_by == migration_id:
                    sequence = self._live[request_id]
                    self.batcher.pool.withdraw(sequence.blocks)
                    self._end(sequence)
                    return

        await self._call(drop)

    # ---- the rest

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        def live() -> list[RequestId]:
            here = (*self._live.values(), *self._arriving.values())
            return [RequestId(sequence.request_id) for sequence in here if client in (None, sequence.client)]

        return await self._call(live)

    async def held_blocks(self) -> list[HeldBlocks]:
        return await self._call(lambda: held_blocks(self._live.values(), self._arriving.values()))

    async def utility(self, method: str, *arguments: object) -> object:
        answers: dict[str, object] = {
            "get_supported_tasks": ("generate",),
            "is_sleeping": False,
            "is_scheduler_paused": False,
            "reset_prefix_cache": True,
        }
        if method not in answers:
            raise InvalidRequestError(f"{method} is not a utility of a simulated engine")
        return answers[method]

    async def check_integrity(self) -> list[str]:
        def check() -> list[str]:
            holders = [*self._live.values(), *self._arriving.values()]
            problems = self.batcher.pool.check_integrity([b for s in holders for b in s.blocks])
            if not set(self._arrived) <= set(self._live):
                problems.append(f"ended requests are remembered as arrivals: {sorted(self._arrived)}")
            for name, table in (
                ("suspended", self._suspended),
                ("arriving", self._arriving),
                ("asked for a stage", self._waiters),
            ):
                if table and not self._live:
                    problems.append(f"still {name} at rest: {sorted(table)}")
            return problems

        return await self._call(check)

    def load(self) -> EngineLoad:
        batcher = self.batcher
        prefilling = 0
        if self.settings.chunk_tokens is not None:
            prefilling = sum(s.num_tokens - s.computed for s in batcher.running if not s.is_decoding)
        return EngineLoad(
            total_blocks=self.settings.num_blocks,
            free_blocks=batcher.pool.num_free,
            reserved_blocks=sum(len(s.blocks) for s in self._arriving.values()) if self._arriving else 0,
            running=len(batcher.running) + len(self._suspended),
            suspended=len(self._suspended),
            waiting=len(batcher.waiting),
            waiting_tokens=batcher.waiting_tokens + prefilling,
            head_of_line_blocks=batcher.num_blocks(batcher.waiting[0].num_tokens) if batcher.waiting else 0,
            block_tokens=self.settings.block_tokens,
            waiting_blocks=batcher.waiting_blocks,
            watermark_blocks=batcher.watermark_blocks,
            preempted=batcher.num_preempted,
            high_priority=sum(priority_class(s.priority) is PriorityClass.HIGH for s in batcher.running),
        )

    # ---- steps

    def _step_ended(self, step: Step) -> None:
        self.steps += 1
        by_client: dict[str, tuple[list[SimulatedOutput], list[tuple[int, int]]]] = {}
        for sequence in self.batcher.apply(step, self._loop.time()):
            output = sequence.output
            finished = len(output) >= sequence.max_tokens
            bucket = by_client.get(sequence.client)
            if bucket is None:
                bucket = by_client[sequence.client] = ([], [])
            emitted = sequence.emitted
            times = None if emitted else sequence.times(self._loop.time())
            reason = "length" if finished else None
            bucket[0].append(SimulatedOutput(sequence.request_id, output[emitted:], reason, times))
            bucket[1].append((sequence.epoch, emitted))
            sequence.emitted = len(output)
            if finished:
                self._end(sequence)
        for client, (outputs, spans) in by_client.items():
            self._sink(client, outputs, spans)
        self._visit()

    def _visit(self) -> None:
        """Between two steps: carries out what was asked, answers migrations, reports, and goes on."""
        self._timer = None
        while self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()
        if self._waiters:
            self._settle_stages()
        self.batcher.held_slots = len(self._suspended) + len(self._arriving)
        step = self.batcher.schedule(self._loop.time())
        if self._ended:
            ended, self._ended = self._ended, []
            self._loop.call_soon(self._events.on_requests_ended, ended)
        self._report()
        if step is not None:
            step.begin(self._loop.time())
            duration_s = step.duration_s
            if self._is_copying():
                duration_s *= 1.0 + self.settings.migration_slowdown
            self.busy_s += duration_s
            self._timer = self._loop.call_later(duration_s, self._step_ended, step)

    def _report(self) -> None:
        """As vLLM's adapter: what only grows by a token per request is reported less often than steps end."""
        batcher, now = self.batcher, self._loop.time()
        state = (len(batcher.running), len(batcher.waiting), len(self._arriving), len(self._suspended))
        if state != self._reported or now - self._reported_at >= LOAD_INTERVAL_S:
            self._reported, self._reported_at = state, now
            self._events.on_load(self.load())

    def _settle_stages(self) -> None:
        for request_id, waiter in list(self._waiters.items()):
            answer = self._next_stage(request_id, waiter)
            if answer is not None:
                del self._waiters[request_id]
                _settle(waiter.answer, answer)

    def _next_stage(self, request_id: str, waiter: _Waiter) -> BlockRun | FinalState | SourceGoneError | None:
        sequence, done = self._live.get(request_id), waiter.blocks_done
        if sequence is None:
            return SourceGoneError(RefusalCode.FINISHED, "the request has finished")
        if sequence.preemptions != waiter.incarnation:
            return SourceGoneError(RefusalCode.PREEMPTED, "the request was preempted")
        if request_id not in self._suspended:
            num_blocks = self.batcher.num_blocks(sequence.computed)
            if not (sequence.is_decoding and (waiter.suspend or num_blocks - done <= TAIL_BLOCKS)):
                full = sequence.computed // self.settings.block_tokens
                return BlockRun(done, sequence.blocks[done:full]) if full > done else None
            self.batcher.running.remove(sequence)
            self._suspended[request_id] = sequence
        end = self.batcher.num_blocks(sequence.computed)
        return FinalState(
            tail=BlockRun(done, sequence.blocks[done:end]),
            epoch=sequence.epoch,
            output_token_ids=list(sequence.output),
            num_computed_tokens=sequence.computed,
        )

    def _prefill_started(self, sequences: list[Sequence]) -> None:
        self._events.on_prefill_started([RequestId(s.request_id) for s in sequences])

    # ---- books

    def _arriving_sequence(self, migration_id: str) -> Sequence:
        if migration_id not in self._arriving:
            text = "nothing is reserved for this migration"
            raise DestinationRefusedError(RefusalCode.UNKNOWN_MIGRATION, text)
        return self._arriving[migration_id]

    def _end(self, sequence: Sequence) -> None:
        self._suspended.pop(sequence.request_id, None)
        self._forget(sequence)
        self._ended.append(RequestId(sequence.request_id))

    def _forget(self, sequence: Sequence) -> None:
        self.batcher.remove(sequence)
        self._live.pop(sequence.request_id, None)
        self._arrived.pop(sequence.request_id, None)

    # ---- visits

    def _submit(self, call: Callable[[], None]) -> None:
        if self._stopped:
            raise EngineDeadError("the engine has stopped")
        self._calls.append(call)
        if self._timer is None:
            self._timer = self._loop.call_soon(self._visit)

    async def _call(self, function: Callable[[], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                result: Any = function()
            except (MigrationError, InvalidRequestError) as error:
                result = error
            _settle(future, result)

        self._submit(call)
        return await future


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
